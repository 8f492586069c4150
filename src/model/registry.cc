#include "model/registry.h"

#include <string>

namespace baton {

std::span<const Architecture* const> architectures() {
  static constexpr const Architecture* kAll[] = {&kLlama, &kMistral, &kQwen2, &kQwen3};
  return kAll;
}

Result<const Architecture*> find_architecture(std::string_view name) {
  std::string known;
  for (const Architecture* architecture : architectures()) {
    if (architecture->name == name) return architecture;
    known += known.empty() ? "" : ", ";
    known += architecture->name;
  }
  return unimplemented("architecture \"{}\" is not known; there are {}", name.substr(0, 100), known);
}

}  // namespace baton
