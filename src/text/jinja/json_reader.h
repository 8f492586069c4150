#pragma once

#include <string_view>

#include "text/jinja/value.h"

namespace baton::jinja {

/// A JSON document as a Value, with Python's reading of it: of equal keys the last value wins at the
/// place of the first, integers of any size stay exact. `what` names it in errors ("messages").
/// Throws TemplateError. Linear in the size of the text.
Value parse_json(std::string_view text, std::string_view what, Budget& budget);

}  // namespace baton::jinja
