#pragma once

#include <CLI/CLI.hpp>
#include <memory>
#include <string>

namespace baton::cli {

/// Short help: "--port N   port to listen on [8000]". Environment names follow one rule that the footer tells, so they are
/// not repeated at every option.
class HelpFormatter : public CLI::Formatter {
 public:
  std::string make_option_opts(const CLI::Option* option) const override {
    if (option->get_type_size() == 0 || option->get_expected_min() == 0) return "";  // a flag
    std::string type = option->get_type_name();
    std::string value = type.starts_with("INT") || type.starts_with("UINT") || type.starts_with("FLOAT") ? " N" : " VALUE";
    if (option->get_expected_max() > 1) value += " ...";
    return option->get_required() ? value + " (required)" : value;
  }
  std::string make_option_desc(const CLI::Option* option) const override {
    std::string text = option->get_description();
    if (!option->get_default_str().empty()) text += " [" + option->get_default_str() + "]";
    return text;
  }
};

}  // namespace baton::cli
