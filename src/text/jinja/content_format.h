#pragma once

#include "text/jinja/ast.h"

namespace baton::jinja {

/// Whether a template goes over the parts of a message's content itself, that is, has a loop over
/// `message.content`, or over a variable that was set from it. Others expect a string there.
bool handles_content_parts(const Template& code);

}  // namespace baton::jinja
