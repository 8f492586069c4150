#include "text/jinja/parser.h"

#include <algorithm>
#include <array>

#include "text/jinja/unicode.h"

namespace baton::jinja {
namespace {

constexpr int kMaxNesting = 100;

bool is_any(const Token& token, std::initializer_list<std::string_view> names) {
  return std::any_of(names.begin(), names.end(), [&](auto name) { return token.is_name(name); });
}

}  // namespace

std::shared_ptr<const Template> parse_template(std::string_view source, const Limits& limits) {
  if (source.size() > limits.max_template_bytes) {
    fail("the template has {} bytes, more than the limit of {}", source.size(), limits.max_template_bytes);
  }
  if (!is_valid_utf8(source)) fail("the template is not valid UTF-8");
  return Parser(tokenize(source)).run();
}

std::shared_ptr<const Template> Parser::run() {
  auto result = std::make_shared<Template>();
  result->body = parse_body({});
  for (const Unknown& unknown : unknown_) {
    if (!unknown.guarded) error(unknown.message, unknown.line);
  }
  result->names = std::move(names_);
  return result;
}

Parser::Nesting::Nesting(Parser& parser) : parser_(parser) {
  if (++parser_.nesting_ > kMaxNesting) {
    --parser_.nesting_;
    parser_.error(fmt::format("blocks and expressions are nested more than {} levels deep", kMaxNesting));
  }
}

const Token& Parser::peek(std::size_t ahead) const {
  return tokens_[std::min(position_ + ahead, tokens_.size() - 1)];
}

const Token& Parser::next() {
  const Token& token = peek();
  if (position_ + 1 < tokens_.size()) ++position_;
  return token;
}

bool Parser::skip_op(std::string_view symbol) {
  if (!peek().is_op(symbol)) return false;
  next();
  return true;
}

bool Parser::skip_name(std::string_view name) {
  if (!peek().is_name(name)) return false;
  next();
  return true;
}

void Parser::expect_op(std::string_view symbol) {
  if (!skip_op(symbol)) unexpected(fmt::format("'{}'", symbol));
}

void Parser::expect_name(std::string_view name) {
  if (!skip_name(name)) unexpected(fmt::format("'{}'", name));
}

void Parser::expect_block_end() {
  if (peek().kind != TokenKind::block_end) unexpected("%}");
  next();
}

void Parser::error(std::string message, int line) const {
  throw TemplateError{std::move(message), line > 0 ? line : peek().line};
}

void Parser::unexpected(std::string_view wanted) const {
  error(fmt::format("expected {}, found {}", wanted, describe(peek())));
}

NameId Parser::intern(const std::string& name) {
  const auto [found, added] = ids_.try_emplace(name, static_cast<NameId>(names_.size()));
  if (added) names_.push_back(name);
  return found->second;
}

void Parser::note_unknown(std::string_view what, const std::string& name, int line) {
  unknown_.push_back({fmt::format("no {} named '{}'", what, name), line, false});
}

/// Statements until a tag in `ends`, whose name is the next token then; the whole rest when `ends` is empty.
Body Parser::parse_body(Names ends) {
  Body body;
  while (peek().kind != TokenKind::end) {
    const Token& token = next();
    switch (token.kind) {
      case TokenKind::data: body.push_back(std::make_unique<DataStatement>(token.line, token.text)); break;
      case TokenKind::variable_begin: {
        const int line = token.line;
        body.push_back(std::make_unique<OutputStatement>(line, parse_tuple()));
        if (peek().kind != TokenKind::variable_end) unexpected("}}");
        next();
        break;
      }
      default:  // block_begin: the lexer lets nothing else stand here
        if (is_any(peek(), ends)) return body;
        if (peek().is_name("print")) {
          parse_print(body);
        } else if (auto statement = parse_statement()) {
          body.push_back(std::move(statement));
        }
        expect_block_end();
    }
  }
  if (ends.size() > 0) error(fmt::format("the template ends before {{% {} %}}", *std::prev(ends.end())));
  return body;
}

/// The end of an opening tag and its body.
Body Parser::parse_block_body(Names ends) {
  skip_op(":");
  expect_block_end();
  return parse_body(ends);
}

std::unique_ptr<Statement> Parser::parse_statement() {
  const Nesting nesting(*this);
  const Token& tag = peek();
  if (tag.kind != TokenKind::name) unexpected("the name of a tag");
  if (skip_name("if")) return parse_if();
  if (skip_name("for")) return parse_for();
  if (skip_name("set")) return parse_set();
  if (skip_name("macro")) return parse_macro();
  if (skip_name("call")) return parse_call_block();
  if (skip_name("filter")) return parse_filter_block();
  if (skip_name("with")) return parse_with();
  if (skip_name("generation")) return parse_scope("endgeneration");
  if (skip_name("block")) return parse_named_block();
  if (skip_name("break")) return parse_jump(true);
  if (skip_name("continue")) return parse_jump(false);
  if (skip_name("autoescape")) {
    if (!is_any(peek(), {"false", "False"})) error("{% autoescape %} is supported only as 'false'");
    next();
    return parse_scope("endautoescape");
  }
  if (is_any(tag, {"extends", "include", "import", "from"})) {
    error(fmt::format("{{% {} %}} is not supported: a chat template is one file", tag.text));
  }
  error(fmt::format("unknown tag '{}'", tag.text));
}

std::unique_ptr<Statement> Parser::parse_if() {
  auto statement = std::make_unique<IfStatement>(peek().line);
  const std::size_t first_unknown = unknown_.size();
  while (true) {
    ExprPtr condition = parse_tuple(false);
    Body body = parse_block_body({"elif", "else", "endif"});
    statement->branches.emplace_back(std::move(condition), std::move(body));
    if (skip_name("elif")) continue;
    if (skip_name("else")) statement->otherwise = parse_block_body({"endif"});
    expect_name("endif");
    break;
  }
  for (std::size_t i = first_unknown; i < unknown_.size(); ++i) unknown_[i].guarded = true;
  return statement;
}

std::unique_ptr<Statement> Parser::parse_for() {
  auto statement = std::make_unique<ForStatement>(peek().line);
  statement->target = parse_target(false, "in");
  if (mentions(statement->target, "loop")) error("'loop' cannot be the variable of a for loop");
  expect_name("in");
  statement->iterable = parse_tuple(false, false, "recursive");
  if (skip_name("if")) statement->condition = parse_expression();
  statement->recursive = skip_name("recursive");
  ++loops_;
  statement->body = parse_block_body({"else", "endfor"});
  --loops_;
  if (skip_name("else")) statement->otherwise = parse_block_body({"endfor"});
  expect_name("endfor");
  return statement;
}

std::unique_ptr<Statement> Parser::parse_set() {
  const int line = peek().line;
  Target target = parse_target(true);
  if (skip_op("=")) {
    auto statement = std::make_unique<SetStatement>(line);
    statement->target = std::move(target);
    statement->value = parse_tuple();
    return statement;
  }
  auto statement = std::make_unique<SetBlockStatement>(line);
  statement->target = std::move(target);
  while (peek().is_op("|")) statement->filter = parse_filter(std::move(statement->filter));
  statement->body = parse_block_body({"endset"});
  expect_name("endset");
  return statement;
}

NameId Parser::parse_name() {
  if (peek().kind != TokenKind::name) unexpected("a name");
  return intern(next().text);
}

void Parser::parse_signature(Signature& signature) {
  expect_op("(");
  bool has_default = false;
  while (!peek().is_op(")")) {
    if (!signature.parameters.empty()) expect_op(",");
    const NameId name = parse_name();
    ExprPtr fallback;
    if (skip_op("=")) {
      fallback = parse_expression();
      has_default = true;
    } else if (has_default) {
      error("a parameter without a default follows one that has a default");
    }
    signature.parameters.emplace_back(name, std::move(fallback));
  }
  next();
}

/// A macro takes extra arguments only when its body mentions them, so the body is watched.
void Parser::parse_macro_body(Signature& signature, Body& body, std::string_view end) {
  macros_.push_back(&signature);
  const int loops = std::exchange(loops_, 0);  // break cannot leave a macro
  body = parse_block_body({end});
  loops_ = loops;
  macros_.pop_back();
  expect_name(end);
}

std::unique_ptr<Statement> Parser::parse_macro() {
  auto statement = std::make_unique<MacroStatement>(peek().line);
  statement->name = parse_name();
  parse_signature(statement->signature);
  parse_macro_body(statement->signature, statement->body, "endmacro");
  return statement;
}

std::unique_ptr<Statement> Parser::parse_call_block() {
  auto statement = std::make_unique<CallBlockStatement>(peek().line);
  statement->caller.line = statement->line;
  statement->caller.name = intern("caller");
  if (peek().is_op("(")) parse_signature(statement->caller.signature);
  ExprPtr call = parse_expression();
  if (call->kind != ExprKind::call) error("{% call %} needs a call of a macro", statement->line);
  statement->call.reset(static_cast<CallExpr*>(call.release()));
  parse_macro_body(statement->caller.signature, statement->caller.body, "endcall");
  return statement;
}

std::unique_ptr<Statement> Parser::parse_filter_block() {
  auto statement = std::make_unique<FilterBlockStatement>(peek().line);
  statement->filter = parse_filter(nullptr);
  while (peek().is_op("|")) statement->filter = parse_filter(std::move(statement->filter));
  statement->body = parse_block_body({"endfilter"});
  expect_name("endfilter");
  return statement;
}

std::unique_ptr<Statement> Parser::parse_with() {
  auto statement = std::make_unique<WithStatement>(peek().line);
  while (peek().kind != TokenKind::block_end) {
    if (!statement->bindings.empty()) expect_op(",");
    Target target = parse_target(false);
    expect_op("=");
    statement->bindings.emplace_back(std::move(target), parse_expression());
  }
  statement->body = parse_block_body({"endwith"});
  expect_name("endwith");
  return statement;
}

std::unique_ptr<Statement> Parser::parse_scope(std::string_view end) {
  auto statement = std::make_unique<ScopeStatement>(peek().line);
  statement->body = parse_block_body({end});
  expect_name(end);
  return statement;
}

std::unique_ptr<Statement> Parser::parse_named_block() {
  const std::string name = names_[parse_name()];
  skip_name("scoped");
  auto statement = parse_scope("endblock");
  skip_name(name);
  return statement;
}

std::unique_ptr<Statement> Parser::parse_jump(bool is_break) {
  if (loops_ == 0) error(fmt::format("'{}' outside a for loop", is_break ? "break" : "continue"));
  return std::make_unique<JumpStatement>(peek().line, is_break);
}

bool Parser::mentions(const Target& target, std::string_view name) const {
  if (!target.is_tuple) return names_[target.name] == name;
  return std::any_of(target.items.begin(), target.items.end(), [&](const Target& item) { return mentions(item, name); });
}

/// {% print a, b %}
void Parser::parse_print(Body& body) {
  const int line = next().line;
  for (bool first = true; peek().kind != TokenKind::block_end; first = false) {
    if (!first) expect_op(",");
    body.push_back(std::make_unique<OutputStatement>(line, parse_expression()));
  }
}

Target Parser::parse_single_target(bool with_namespace) {
  const Nesting nesting(*this);
  Target target;
  target.line = peek().line;
  if (skip_op("(")) {
    target = parse_target(with_namespace);
    expect_op(")");
    return target;
  }
  if (is_any(peek(), {"true", "false", "none", "True", "False", "None"})) error("a constant cannot be assigned to");
  target.name = parse_name();
  if (with_namespace && skip_op(".")) target.attribute = names_[parse_name()];
  return target;
}

Target Parser::parse_target(bool with_namespace, std::string_view end_name) {
  Target first = parse_single_target(with_namespace);
  if (!peek().is_op(",")) return first;
  Target tuple;
  tuple.line = first.line;
  tuple.is_tuple = true;
  tuple.items.push_back(std::move(first));
  while (skip_op(",")) {
    if (peek().is_op(")") || peek().is_op("=") || peek().kind == TokenKind::block_end ||
        (!end_name.empty() && peek().is_name(end_name))) {
      break;
    }
    tuple.items.push_back(parse_single_target(with_namespace));
  }
  return tuple;
}

}  // namespace baton::jinja
