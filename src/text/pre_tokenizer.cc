#include "text/pre_tokenizer.h"

#include <utility>

namespace baton {
namespace {

// Rewrites every piece with `rewrite(piece, at_origin, out)`, which appends its new text to out.
template <typename Rewrite>
void rewrite_pieces(PreTokenizer::Pieces& pieces, const Rewrite& rewrite) {
  std::string& out = pieces.text.data() == pieces.buffers[0].data() ? pieces.buffers[1] : pieces.buffers[0];
  out.clear();
  pieces.next.clear();
  size_t origin_bytes = 0;
  for (const TextSpan& span : pieces.spans) {
    const size_t begin = out.size();
    const bool at_origin = span.begin < pieces.origin_bytes;
    const std::string_view piece = pieces.text.substr(span.begin, span.end - span.begin);
    const size_t prefix = rewrite(piece, at_origin, out);
    // What was put in front of the first character, and that character, stem from the origin.
    if (at_origin) origin_bytes = begin + prefix + unicode::sequence_length(out[begin + prefix]);
    pieces.next.push_back({static_cast<uint32_t>(begin), static_cast<uint32_t>(out.size())});
  }
  pieces.text = out;
  pieces.origin_bytes = origin_bytes;
  pieces.spans.swap(pieces.next);
}

}  // namespace

Status PreTokenizer::apply_split(const Pattern& pattern, SplitBehavior behavior, bool invert, Pieces& pieces,
                                 Regex::Scratch& scratch) const {
  pieces.next.clear();
  for (const TextSpan& span : pieces.spans) {
    const std::string_view piece = pieces.text.substr(span.begin, span.end - span.begin);
    BATON_RETURN_IF_ERROR(pattern.find(piece, pieces.matches, scratch));
    split_at(pieces.matches, piece.size(), behavior, invert, span.begin, pieces.next);
  }
  pieces.spans.swap(pieces.next);
  return {};
}

Status PreTokenizer::apply(TextPart part, Pieces& pieces, Regex::Scratch& scratch) const {
  pieces.text = part.text;
  pieces.origin_bytes = part.origin_bytes;
  pieces.spans.clear();
  if (!part.text.empty()) pieces.spans.push_back({0, static_cast<uint32_t>(part.text.size())});

  for (size_t i = 0; i < steps_.size(); ++i) {
    if (pieces.text.size() > kMaxNormalizedBytes) {
      return resource_exhausted("the pre-tokenizer makes a text of {} bytes, the limit is {}", pieces.text.size(), kMaxNormalizedBytes);
    }
    if (const auto* split = std::get_if<Split>(&steps_[i])) {
      BATON_RETURN_IF_ERROR(apply_split(split->pattern, split->behavior, split->invert, pieces, scratch));
    } else if (const auto* byte_level = std::get_if<ByteLevel>(&steps_[i])) {
      if (byte_level->add_prefix_space) {
        rewrite_pieces(pieces, [](std::string_view piece, bool, std::string& out) -> size_t {
          const bool add = !piece.starts_with(' ');
          if (add) out += ' ';
          out.append(piece);
          return add ? 1 : 0;
        });
      }
      if (byte_level->pattern) {
        BATON_RETURN_IF_ERROR(apply_split(*byte_level->pattern, SplitBehavior::kIsolated, false, pieces, scratch));
      }
      if (i + 1 < steps_.size()) {
        rewrite_pieces(pieces, [](std::string_view piece, bool, std::string& out) -> size_t {
          out += to_byte_level(piece);
          return 0;
        });
      }
    } else {
      const auto& metaspace = std::get<Metaspace>(steps_[i]);
      rewrite_pieces(pieces, [&](std::string_view piece, bool at_origin, std::string& out) -> size_t {
        const bool prepend = metaspace.prepend == Prepend::kAlways || (metaspace.prepend == Prepend::kFirst && at_origin);
        const bool already = piece.starts_with(' ') || piece.starts_with(metaspace.replacement);
        if (prepend && !already) out += metaspace.replacement;
        for (char c : piece) {
          if (c == ' ') {
            out += metaspace.replacement;
          } else {
            out += c;
          }
        }
        return prepend && !already ? metaspace.replacement.size() : 0;
      });
      if (metaspace.split) {
        BATON_ASSIGN_OR_RETURN(const Pattern pattern, Pattern::literal(metaspace.replacement));
        BATON_RETURN_IF_ERROR(apply_split(pattern, SplitBehavior::kMergedWithNext, false, pieces, scratch));
      }
    }
  }
  return {};
}

}  // namespace baton
