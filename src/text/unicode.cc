#include "text/unicode.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <unordered_map>
#include <utility>
#include <vector>

namespace baton::unicode {
namespace {

struct CharRange {
  char32_t first;
  uint16_t value;
};
struct StandIn {
  char32_t first, last, replacement;
};
struct Decomposition {
  char32_t code_point;
  uint16_t at;
  uint8_t length;
};
struct Composition {
  char32_t first, second, composed;
};
struct CombiningClass {
  char32_t code_point;
  uint8_t value;
};
struct Lower {
  char32_t code_point, first, second;
};

#include "text/unicode_tables.inc"

constexpr char32_t kHangulBase = 0xAC00, kLBase = 0x1100, kVBase = 0x1161, kTBase = 0x11A7;
constexpr char32_t kLCount = 19, kVCount = 21, kTCount = 28, kHangulCount = kLCount * kVCount * kTCount;

bool is_hangul_syllable(char32_t c) { return c >= kHangulBase && c < kHangulBase + kHangulCount; }

// What normalization must know of a code point, packed for one lookup.
enum NormFlag : uint8_t {
  kDecomposes = 1,        // has a canonical decomposition
  kDecomposesCompat = 2,  // has a compatible one (or a canonical one)
  kNotNfc = 4,            // changes under NFC, or may compose with what stands before it
  kNotNfkc = 8,
  kNonStarter = 16,       // combining class is not 0
};

class NormTable {
 public:
  static const NormTable& instance() {
    static const NormTable table;
    return table;
  }
  uint8_t operator[](char32_t c) const { return pages_[(static_cast<size_t>(page_of_[c >> 8]) << 8) | (c & 0xFF)]; }
  uint8_t combining_class(char32_t c) const {
    const auto* at = std::lower_bound(std::begin(kCombiningClasses), std::end(kCombiningClasses), c,
                                      [](const CombiningClass& e, char32_t value) { return e.code_point < value; });
    return at != std::end(kCombiningClasses) && at->code_point == c ? at->value : 0;
  }

 private:
  NormTable() {
    std::vector<uint8_t> flags(0x110000, 0);
    for (const Decomposition& d : kCanonical) flags[d.code_point] |= kDecomposes | kDecomposesCompat | kNotNfc | kNotNfkc;
    for (const Decomposition& d : kCompatible) flags[d.code_point] |= kDecomposesCompat | kNotNfkc;
    // A code point that composes back from its canonical decomposition is itself in NFC.
    std::vector<char32_t> composed;
    for (const Composition& c : kCompositions) composed.push_back(c.composed);
    for (char32_t c : composed) {
      flags[c] &= static_cast<uint8_t>(~kNotNfc);
      if (!has_own_compatible(c)) flags[c] &= static_cast<uint8_t>(~kNotNfkc);
    }
    for (char32_t c = kHangulBase; c < kHangulBase + kHangulCount; ++c) flags[c] |= kDecomposes | kDecomposesCompat;
    for (const Composition& c : kCompositions) flags[c.second] |= kNotNfc | kNotNfkc;
    for (char32_t c = kVBase; c < kVBase + kVCount; ++c) flags[c] |= kNotNfc | kNotNfkc;
    for (char32_t c = kTBase + 1; c < kTBase + kTCount; ++c) flags[c] |= kNotNfc | kNotNfkc;
    for (const CombiningClass& c : kCombiningClasses) flags[c.code_point] |= kNonStarter;

    std::unordered_map<std::string, uint16_t> known;
    for (size_t page = 0; page < page_of_.size(); ++page) {
      std::string bytes(reinterpret_cast<const char*>(flags.data()) + page * 256, 256);
      auto [at, added] = known.try_emplace(bytes, static_cast<uint16_t>(known.size()));
      if (added) pages_.insert(pages_.end(), bytes.begin(), bytes.end());
      page_of_[page] = at->second;
    }
  }

  static bool has_own_compatible(char32_t c) {
    return std::binary_search(std::begin(kCompatible), std::end(kCompatible), Decomposition{c, 0, 0},
                              [](const Decomposition& a, const Decomposition& b) { return a.code_point < b.code_point; });
  }

  std::array<uint16_t, 0x1100> page_of_;
  std::vector<uint8_t> pages_;
};

template <size_t N>
const Decomposition* find(const Decomposition (&table)[N], char32_t c) {
  const auto* at = std::lower_bound(std::begin(table), std::end(table), c,
                                    [](const Decomposition& e, char32_t value) { return e.code_point < value; });
  return at != std::end(table) && at->code_point == c ? at : nullptr;
}

// 0 when the two do not compose.
char32_t compose(char32_t first, char32_t second) {
  if (first >= kLBase && first < kLBase + kLCount && second >= kVBase && second < kVBase + kVCount) {
    return kHangulBase + ((first - kLBase) * kVCount + (second - kVBase)) * kTCount;
  }
  if (is_hangul_syllable(first) && (first - kHangulBase) % kTCount == 0 && second > kTBase && second < kTBase + kTCount) {
    return first + (second - kTBase);
  }
  const auto* at = std::lower_bound(
      std::begin(kCompositions), std::end(kCompositions), std::pair(first, second),
      [](const Composition& e, std::pair<char32_t, char32_t> value) { return std::pair(e.first, e.second) < value; });
  return at != std::end(kCompositions) && at->first == first && at->second == second ? at->composed : 0;
}

struct Mark {
  char32_t code_point;
  uint8_t combining_class;
};

// Decomposes one stretch of text and puts its marks in canonical order.
void decompose(std::string_view text, bool compatible, std::vector<Mark>& out) {
  const NormTable& table = NormTable::instance();
  const auto push = [&](char32_t c) {
    out.push_back({c, (table[c] & kNonStarter) ? table.combining_class(c) : uint8_t{0}});
  };
  for (size_t at = 0; at < text.size();) {
    const auto [c, length] = decode(text.data() + at);
    at += length;
    if (is_hangul_syllable(c)) {
      const char32_t index = c - kHangulBase;
      push(kLBase + index / (kVCount * kTCount));
      push(kVBase + index % (kVCount * kTCount) / kTCount);
      if (index % kTCount != 0) push(kTBase + index % kTCount);
      continue;
    }
    const uint8_t flags = table[c];
    const Decomposition* found = nullptr;
    if (compatible && (flags & kDecomposesCompat)) found = find(kCompatible, c);
    if (found == nullptr && (flags & kDecomposes)) found = find(kCanonical, c);
    if (found == nullptr) {
      push(c);
    } else {
      for (uint8_t i = 0; i < found->length; ++i) push(kDecompositionPool[found->at + i]);
    }
  }
  for (size_t begin = 0; begin < out.size();) {
    if (out[begin].combining_class == 0) {
      ++begin;
      continue;
    }
    size_t end = begin;
    while (end < out.size() && out[end].combining_class != 0) ++end;
    std::stable_sort(out.begin() + static_cast<ptrdiff_t>(begin), out.begin() + static_cast<ptrdiff_t>(end),
                     [](const Mark& a, const Mark& b) { return a.combining_class < b.combining_class; });
    begin = end;
  }
}

void compose(std::vector<Mark>& marks) {
  constexpr size_t kNone = static_cast<size_t>(-1);
  size_t size = 0, starter = kNone;
  for (const Mark mark : marks) {
    if (starter != kNone) {
      const bool adjacent = size == starter + 1;
      if (adjacent || marks[size - 1].combining_class < mark.combining_class) {
        if (const char32_t composed = compose(marks[starter].code_point, mark.code_point)) {
          marks[starter].code_point = composed;
          continue;
        }
      }
    }
    if (mark.combining_class == 0) starter = size;
    marks[size++] = mark;
  }
  marks.resize(size);
}

size_t skip_ascii(std::string_view text, size_t at) {
  while (at + 8 <= text.size()) {
    uint64_t bytes;
    std::memcpy(&bytes, text.data() + at, 8);
    if (bytes & 0x8080808080808080ULL) break;
    at += 8;
  }
  while (at < text.size() && static_cast<unsigned char>(text[at]) < 0x80) ++at;
  return at;
}

uint8_t unsafe_flags(Form form) {
  switch (form) {
    case Form::kNfc: return kNotNfc | kNonStarter;
    case Form::kNfkc: return kNotNfkc | kNonStarter;
    case Form::kNfd: return kDecomposes | kNonStarter;
    case Form::kNfkd: return kDecomposesCompat | kNonStarter;
  }
  return 0xFF;
}

// First character at or after `at` that may change in this form. Marks already in order and not
// composing are passed over, so that Thai, Arabic or Devanagari need no rewriting.
size_t find_unsafe(std::string_view text, size_t at, Form form) {
  const NormTable& table = NormTable::instance();
  const uint8_t unsafe = unsafe_flags(form);
  uint8_t last_class = 0;
  while (at < text.size()) {
    if (static_cast<unsigned char>(text[at]) < 0x80) {
      last_class = 0;
      at = skip_ascii(text, at);
      continue;
    }
    const auto [c, length] = decode(text.data() + at);
    const uint8_t flags = table[c] & unsafe;
    if (flags & ~kNonStarter) return at;
    if (flags != 0) {
      const uint8_t combining_class = table.combining_class(c);
      if (combining_class < last_class) return at;
      last_class = combining_class;
    } else {
      last_class = 0;
    }
    at += length;
  }
  return at;
}

}  // namespace

const CharTable& CharTable::instance() {
  static const CharTable table;
  return table;
}

CharTable::CharTable() {
  std::vector<uint16_t> values(0x110000, 0);
  for (size_t i = 0; i < std::size(kCharRanges); ++i) {
    const char32_t end = i + 1 < std::size(kCharRanges) ? kCharRanges[i + 1].first : 0x110000;
    std::fill(values.begin() + kCharRanges[i].first, values.begin() + end, kCharRanges[i].value);
  }
  std::unordered_map<std::string, uint16_t> known;
  std::vector<uint16_t> pages;
  for (size_t page = 0; page < page_of_.size(); ++page) {
    const uint16_t* begin = values.data() + page * 256;
    std::string bytes(reinterpret_cast<const char*>(begin), 256 * sizeof(uint16_t));
    auto [at, added] = known.try_emplace(std::move(bytes), static_cast<uint16_t>(known.size()));
    if (added) pages.insert(pages.end(), begin, begin + 256);
    page_of_[page] = at->second;
  }
  pages_ = std::make_unique<uint16_t[]>(pages.size());
  std::copy(pages.begin(), pages.end(), pages_.get());
}

void append_utf8(std::string& out, char32_t c) {
  if (c < 0x80) {
    out += static_cast<char>(c);
  } else if (c < 0x800) {
    out += static_cast<char>(0xC0 | (c >> 6));
    out += static_cast<char>(0x80 | (c & 0x3F));
  } else if (c < 0x10000) {
    out += static_cast<char>(0xE0 | (c >> 12));
    out += static_cast<char>(0x80 | ((c >> 6) & 0x3F));
    out += static_cast<char>(0x80 | (c & 0x3F));
  } else {
    out += static_cast<char>(0xF0 | (c >> 18));
    out += static_cast<char>(0x80 | ((c >> 12) & 0x3F));
    out += static_cast<char>(0x80 | ((c >> 6) & 0x3F));
    out += static_cast<char>(0x80 | (c & 0x3F));
  }
}

namespace {

// Table 3-7 of the Unicode Standard. `good` is how many bytes at the start of `text` are right for
// the character that the first byte announces; `length` how many it needs, 0 for an impossible lead.
struct Scan {
  size_t good;
  size_t length;
};

Scan scan_character(std::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char lead = byte(0);
  if (lead < 0x80) return {1, 1};
  size_t length;
  unsigned char low = 0x80, high = 0xBF;
  if (lead >= 0xC2 && lead <= 0xDF) {
    length = 2;
  } else if (lead >= 0xE0 && lead <= 0xEF) {
    length = 3;
    if (lead == 0xE0) low = 0xA0;
    if (lead == 0xED) high = 0x9F;
  } else if (lead >= 0xF0 && lead <= 0xF4) {
    length = 4;
    if (lead == 0xF0) low = 0x90;
    if (lead == 0xF4) high = 0x8F;
  } else {
    return {0, 0};
  }
  size_t good = 1;
  while (good < length && good < text.size() && byte(good) >= low && byte(good) <= high) {
    low = 0x80;
    high = 0xBF;
    ++good;
  }
  return {good, length};
}

}  // namespace

size_t valid_prefix(std::string_view text) {
  size_t at = 0;
  while (true) {
    at = skip_ascii(text, at);
    if (at == text.size()) return at;
    const Scan scan = scan_character(text.substr(at));
    if (scan.length == 0 || scan.good < scan.length) return at;
    at += scan.length;
  }
}

bool is_incomplete_character(std::string_view text) {
  if (text.empty()) return false;
  const Scan scan = scan_character(text);
  return scan.length != 0 && scan.good < scan.length && scan.good == text.size();
}

size_t append_lossy(std::string& out, std::string_view text, bool keep_tail) {
  size_t at = 0;
  while (at < text.size()) {
    const size_t good = valid_prefix(text.substr(at));
    out.append(text.substr(at, good));
    at += good;
    if (at == text.size()) break;
    const Scan scan = scan_character(text.substr(at));
    if (keep_tail && scan.length != 0 && at + scan.good == text.size()) return at;
    out += "\xEF\xBF\xBD";
    at += std::max<size_t>(scan.good, 1);
  }
  return at;
}

bool is_normalized(std::string_view text, Form form) { return find_unsafe(text, 0, form) == text.size(); }

std::string normalize(std::string_view text, Form form) {
  const NormTable& table = NormTable::instance();
  const bool compatible = form == Form::kNfkc || form == Form::kNfkd;
  const bool composing = form == Form::kNfc || form == Form::kNfkc;
  const uint8_t unsafe = unsafe_flags(form);
  std::string out;
  out.reserve(text.size() + text.size() / 8);
  std::vector<Mark> marks;
  size_t copied = 0;
  while (true) {
    size_t end = find_unsafe(text, copied, form);
    // The stretch to rewrite begins at the last safe starter before the unsafe character ...
    size_t begin = end;
    if (end < text.size()) {
      while (begin > copied) {
        begin = previous(text, begin);
        if ((table[decode(text.data() + begin).code_point] & unsafe) == 0) break;
      }
    }
    out.append(text.substr(copied, begin - copied));
    if (end == text.size()) return out;
    // ... and ends before the next one, which nothing to its left can change.
    end += sequence_length(text[end]);
    while (end < text.size() && (table[decode(text.data() + end).code_point] & unsafe) != 0) {
      end += sequence_length(text[end]);
    }
    marks.clear();
    decompose(text.substr(begin, end - begin), compatible, marks);
    if (composing) compose(marks);
    for (const Mark& mark : marks) append_utf8(out, mark.code_point);
    copied = end;
  }
}

std::string lowercase(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (size_t at = 0; at < text.size();) {
    const auto [c, length] = decode(text.data() + at);
    if (c < 0x80) {
      out += static_cast<char>(c >= 'A' && c <= 'Z' ? c + 32 : c);
    } else {
      const auto* found = std::lower_bound(std::begin(kLower), std::end(kLower), c,
                                           [](const Lower& e, char32_t value) { return e.code_point < value; });
      if (found != std::end(kLower) && found->code_point == c) {
        append_utf8(out, found->first);
        if (found->second != 0) append_utf8(out, found->second);
      } else {
        out.append(text.substr(at, length));
      }
    }
    at += length;
  }
  return out;
}

char32_t stand_in(char32_t c) {
  const auto* found = std::upper_bound(std::begin(kStandIns), std::end(kStandIns), c,
                                       [](char32_t value, const StandIn& e) { return value < e.first; });
  if (found != std::begin(kStandIns) && c <= std::prev(found)->last) return std::prev(found)->replacement;
  // Unassigned: a newer PCRE2 may know it, but noncharacters stay unassigned for ever.
  return c < 0x10000 ? 0xFFFF : 0x1FFFF;
}

std::string class_ranges(CharFlag flag, bool with) {
  std::string out;
  for (size_t i = 0; i < std::size(kCharRanges);) {
    const auto member = [&](size_t k) { return ((kCharRanges[k].value & flag) != 0) == with; };
    if (!member(i)) {
      ++i;
      continue;
    }
    size_t end = i;
    while (end < std::size(kCharRanges) && member(end)) ++end;
    const uint32_t first = kCharRanges[i].first;
    uint32_t last = (end < std::size(kCharRanges) ? kCharRanges[end].first : 0x110000) - 1;
    if (last >= 0xD800 && last <= 0xDFFF) last = 0xD7FF;  // surrogates may not be named
    out += first == last ? fmt::format("\\x{{{:X}}}", first) : fmt::format("\\x{{{:X}}}-\\x{{{:X}}}", first, last);
    i = end;
  }
  return out;
}

}  // namespace baton::unicode
