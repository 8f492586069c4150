#pragma once

#include <initializer_list>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "text/jinja/ast.h"
#include "text/jinja/lexer.h"

namespace baton::jinja {

/// Parses a template by Jinja2's grammar with the loopcontrols extension and {% generation %}.
/// Templates that need a loader (extends, include, import) are refused. Throws TemplateError.
std::shared_ptr<const Template> parse_template(std::string_view source, const Limits& limits);

/// Recursive descent, one function per rule of the grammar, in Jinja2's order of precedence.
class Parser {
 public:
  explicit Parser(std::vector<Token> tokens) : tokens_(std::move(tokens)) {}
  std::shared_ptr<const Template> run();

 private:
  using Names = std::initializer_list<std::string_view>;

  // parser.cc: statements
  Body parse_body(Names ends);
  Body parse_block_body(Names ends);
  std::unique_ptr<Statement> parse_statement();
  std::unique_ptr<Statement> parse_if();
  std::unique_ptr<Statement> parse_for();
  std::unique_ptr<Statement> parse_set();
  std::unique_ptr<Statement> parse_macro();
  std::unique_ptr<Statement> parse_call_block();
  std::unique_ptr<Statement> parse_filter_block();
  std::unique_ptr<Statement> parse_with();
  std::unique_ptr<Statement> parse_scope(std::string_view end);
  std::unique_ptr<Statement> parse_named_block();
  std::unique_ptr<Statement> parse_jump(bool is_break);
  void parse_print(Body& body);
  Target parse_target(bool with_namespace, std::string_view end_name = {});
  Target parse_single_target(bool with_namespace);
  bool mentions(const Target& target, std::string_view name) const;
  NameId parse_name();
  void parse_signature(Signature& signature);
  void parse_macro_body(Signature& signature, Body& body, std::string_view end);

  // parser_expressions.cc
  ExprPtr parse_tuple(bool with_conditional = true, bool parenthesized = false, std::string_view end_name = {});
  ExprPtr parse_expression(bool with_conditional = true);
  ExprPtr parse_conditional();
  ExprPtr parse_logical(bool is_and);
  ExprPtr parse_not();
  ExprPtr parse_compare();
  ExprPtr parse_sum();
  ExprPtr parse_concat();
  ExprPtr parse_product();
  ExprPtr parse_power();
  ExprPtr parse_unary(bool with_filters = true);
  ExprPtr parse_primary();
  ExprPtr parse_postfix(ExprPtr expr);
  ExprPtr parse_filters_and_tests(ExprPtr expr);
  ExprPtr parse_subscript(ExprPtr object);
  ExprPtr parse_call(ExprPtr callee);
  ExprPtr parse_filter(ExprPtr input);
  ExprPtr parse_test(ExprPtr input);
  ExprPtr parse_list();
  ExprPtr parse_dict();
  ExprPtr parse_number();
  ArgumentList parse_arguments();
  /// Sets the height of a finished node, with the bound on it.
  template <typename Node>
  ExprPtr finish(std::unique_ptr<Node> node, std::initializer_list<const Expr*> children);
  int height(const ArgumentList& arguments) const;
  ExprPtr finish_with_height(ExprPtr node, int inner);

  const Token& peek(std::size_t ahead = 0) const;
  const Token& next();
  bool skip_op(std::string_view symbol);
  bool skip_name(std::string_view name);
  void expect_op(std::string_view symbol);
  void expect_name(std::string_view name);
  void expect_block_end();
  [[noreturn]] void error(std::string message, int line = 0) const;
  [[noreturn]] void unexpected(std::string_view wanted) const;
  NameId intern(const std::string& name);
  void note_unknown(std::string_view what, const std::string& name, int line);

  /// Bounds the recursion of this parser, and with it the nesting of what it builds.
  class Nesting {
   public:
    explicit Nesting(Parser& parser);
    ~Nesting() { --parser_.nesting_; }

   private:
    Parser& parser_;
  };

  /// A filter or test that doesn't exist. Jinja2 refuses it when compiling, except where a
  /// condition may guard it: there it fails only when it is reached.
  struct Unknown {
    std::string message;
    int line;
    bool guarded;
  };

  std::vector<Token> tokens_;
  std::size_t position_ = 0;
  int nesting_ = 0;
  int loops_ = 0;  ///< open for loops that break and continue may leave
  std::vector<std::string> names_;
  std::unordered_map<std::string, NameId> ids_;
  std::vector<Signature*> macros_;  ///< whose bodies are being parsed
  std::vector<Unknown> unknown_;
};

}  // namespace baton::jinja
