#include "text/jinja/content_format.h"

#include <set>

namespace baton::jinja {
namespace {

class Detector {
 public:
  explicit Detector(const Template& code) : code_(code) {}

  bool found(const Body& body) {
    for (const auto& statement : body) {
      if (found(*statement)) return true;
    }
    return false;
  }

 private:
  bool found(const Statement& statement) {
    switch (statement.kind) {
      case StatementKind::if_: {
        const auto& node = static_cast<const IfStatement&>(statement);
        for (const auto& [condition, body] : node.branches) {
          if (found(body)) return true;
        }
        return found(node.otherwise);
      }
      case StatementKind::for_: {
        const auto& node = static_cast<const ForStatement&>(statement);
        return is_content(*node.iterable) || found(node.body) || found(node.otherwise);
      }
      case StatementKind::set: {
        const auto& node = static_cast<const SetStatement&>(statement);
        if (!node.target.is_tuple && node.target.attribute.empty() && is_content(*node.value)) aliases_.insert(node.target.name);
        return false;
      }
      case StatementKind::set_block: return found(static_cast<const SetBlockStatement&>(statement).body);
      case StatementKind::macro: return found(static_cast<const MacroStatement&>(statement).body);
      case StatementKind::call_block: return found(static_cast<const CallBlockStatement&>(statement).caller.body);
      case StatementKind::filter_block: return found(static_cast<const FilterBlockStatement&>(statement).body);
      case StatementKind::with: return found(static_cast<const WithStatement&>(statement).body);
      case StatementKind::scope: return found(static_cast<const ScopeStatement&>(statement).body);
      default: return false;
    }
  }

  bool is_content(const Expr& expr) const {
    switch (expr.kind) {
      case ExprKind::filter: {
        const auto& node = static_cast<const FilterExpr&>(expr);
        return node.input != nullptr && is_content(*node.input);
      }
      case ExprKind::attribute: return static_cast<const AttributeExpr&>(expr).name == "content";
      case ExprKind::item: {
        const Expr& key = *static_cast<const ItemExpr&>(expr).key;
        if (key.kind != ExprKind::constant) return false;
        const Value& value = static_cast<const ConstantExpr&>(key).value;
        return value.is_string() && value.as_string() == "content";
      }
      case ExprKind::name: {
        // A macro that renders content calls its parameter so.
        const NameId name = static_cast<const NameExpr&>(expr).name;
        return code_.names[name] == "content" || aliases_.contains(name);
      }
      default: return false;
    }
  }

  const Template& code_;
  std::set<NameId> aliases_;
};

}  // namespace

bool handles_content_parts(const Template& code) { return Detector(code).found(code.body); }

}  // namespace baton::jinja
