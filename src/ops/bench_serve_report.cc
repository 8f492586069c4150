#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "ops/bench_serve.h"
#include "ops/svg.h"

namespace baton::ops {

using nlohmann::ordered_json;

namespace {

std::string load_name(const BenchServeOptions& options) {
  return options.rate > 0 ? fmt::format("{} requests/s (Poisson)", options.rate) : fmt::format("concurrency {}", options.concurrency);
}

ordered_json to_json(const Distribution& d) {
  return {{"mean", d.mean}, {"p50", d.p50}, {"p90", d.p90}, {"p95", d.p95}, {"p99", d.p99}, {"max", d.max}, {"count", d.count}};
}

std::string escape_html(std::string_view text) {
  std::string out;
  for (char c : text) {
    switch (c) {
      case '<': out += "&lt;"; break;
      case '>': out += "&gt;"; break;
      case '&': out += "&amp;"; break;
      default: out += c;
    }
  }
  return out;
}

struct Row {
  const char* name;
  const Distribution& values;
};

std::vector<Row> rows(const BenchServeResult& result) {
  return {{"TTFT ms", result.ttft_ms}, {"ITL ms", result.itl_ms}, {"TPOT ms", result.tpot_ms}, {"E2E ms", result.e2e_ms}};
}

/// A picture of the share of values at or below x. Of many values it ends at the 99.5th percentile: one straggler would
/// press all others against the axis; the table has the maximum.
std::string cumulative_chart(const char* title, const char* of_what, std::vector<double> values) {
  std::sort(values.begin(), values.end());
  bool many = values.size() >= 200;
  size_t shown = many ? values.size() * 995 / 1000 : values.size();
  Series series{title, {}};
  size_t step = std::max<size_t>(1, shown / 400);
  auto add = [&](size_t i) {
    series.points.push_back({values[i], 100.0 * static_cast<double>(i + 1) / static_cast<double>(values.size())});
  };
  for (size_t i = 0; i < shown; i += step) add(i);
  if (shown > 0) add(shown - 1);
  return svg_chart({title, many ? "ms (up to the 99.5th percentile)" : "ms", fmt::format("% of {} at most so long", of_what)}, {series});
}

// A picture of a long run must not be larger than one of a short run.
constexpr size_t kMaxDots = 2000;
constexpr size_t kMaxBins = 300;

/// At most kMaxDots of `points`, evenly spread; never without the highest of the points that one stands for.
Series thinned(Series series) {
  size_t step = (series.points.size() + kMaxDots - 1) / kMaxDots;
  if (step <= 1) return series;
  Series result{series.name, {}};
  for (size_t begin = 0; begin < series.points.size(); begin += step) {
    auto first = series.points.begin() + static_cast<int64_t>(begin);
    auto last = series.points.begin() + static_cast<int64_t>(std::min(begin + step, series.points.size()));
    result.points.push_back(*std::max_element(first, last, [](auto a, auto b) { return a.second < b.second; }));
  }
  return result;
}

}  // namespace

std::string bench_serve_table(const BenchServeResult& result) {
  const BenchServeOptions& o = result.options;
  std::string out = fmt::format("{}  model {}  ISL {}  OSL {}  {}\n", o.url, result.model, o.isl, o.osl, load_name(o));
  out += fmt::format("{} ok, {} failed, {} left early in {:.1f} s\n\n", result.succeeded, result.failed, result.disconnected, result.wall_s);
  out += fmt::format("{:<10}{:>10}{:>10}{:>10}{:>10}{:>10}{:>10}\n", "", "mean", "p50", "p90", "p95", "p99", "max");
  for (const Row& row : rows(result)) {
    const Distribution& d = row.values;
    out += fmt::format("{:<10}{:>10.2f}{:>10.2f}{:>10.2f}{:>10.2f}{:>10.2f}{:>10.2f}\n", row.name, d.mean, d.p50, d.p90, d.p95, d.p99, d.max);
  }
  out += fmt::format("\nrequests/s {:.2f}   output tokens/s {:.1f}   all tokens/s {:.1f}", result.requests_per_s,
                     result.output_tokens_per_s, result.total_tokens_per_s);
  if (o.slo_ttft_ms > 0 || o.slo_itl_ms > 0) {
    out += fmt::format("\ngoodput {:.2f} requests/s within", result.goodput_per_s);
    if (o.slo_ttft_ms > 0) out += fmt::format(" TTFT {} ms", o.slo_ttft_ms);
    if (o.slo_itl_ms > 0) out += fmt::format(" ITL {} ms", o.slo_itl_ms);
  }
  out += "\n";
  for (const auto& [message, count] : result.errors) out += fmt::format("{} x {}\n", count, message);
  return out;
}

std::string bench_serve_json(const BenchServeResult& result) {
  const BenchServeOptions& o = result.options;
  ordered_json out = {
      {"url", o.url}, {"model", result.model}, {"isl", o.isl}, {"osl", o.osl}, {"spread", o.length_spread},
      {"concurrency", o.concurrency}, {"rate", o.rate}, {"shared_prefix", o.shared_prefix}, {"seed", o.seed},
      {"wall_s", result.wall_s}, {"succeeded", result.succeeded}, {"failed", result.failed},
      {"disconnected", result.disconnected}, {"requests_per_s", result.requests_per_s},
      {"output_tokens_per_s", result.output_tokens_per_s}, {"total_tokens_per_s", result.total_tokens_per_s},
      {"goodput_per_s", result.goodput_per_s}, {"slo_ttft_ms", o.slo_ttft_ms}, {"slo_itl_ms", o.slo_itl_ms},
      {"ttft_ms", to_json(result.ttft_ms)}, {"itl_ms", to_json(result.itl_ms)}, {"tpot_ms", to_json(result.tpot_ms)},
      {"e2e_ms", to_json(result.e2e_ms)}, {"errors", result.errors}};
  return out.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
}

std::string bench_serve_html(const BenchServeResult& result) {
  const BenchServeOptions& o = result.options;
  std::vector<double> ttft, itl;
  double bin_s = std::max(1.0, std::ceil(result.wall_s / static_cast<double>(kMaxBins)));
  if (result.wall_s < 10) bin_s = std::max(0.05, result.wall_s / 20);
  std::vector<double> tokens_per_s(static_cast<size_t>(result.wall_s / bin_s) + 1, 0.0);
  Series scatter{"TTFT of each request", {}};
  for (const RequestRecord& record : result.records) {
    if (!record.ok) continue;
    ttft.push_back((record.first_s - record.start_s) * 1e3);
    scatter.points.push_back({record.start_s, ttft.back()});
    double time_s = record.first_s;
    auto count = [&] {
      size_t bin = static_cast<size_t>(std::max(0.0, time_s) / bin_s);
      if (bin < tokens_per_s.size()) tokens_per_s[bin] += 1 / bin_s;
    };
    count();
    for (float gap : record.gaps_s) {
      itl.push_back(gap * 1e3);
      time_s += gap;
      count();
    }
  }
  Series timeline{"output tokens/s", {}};
  // The last bin is shorter than the others: it would show a drop that was none.
  for (size_t bin = 0; bin + 1 < tokens_per_s.size(); ++bin) {
    timeline.points.push_back({(static_cast<double>(bin) + 0.5) * bin_s, tokens_per_s[bin]});
  }
  std::string table = "<table><tr><th></th><th>mean</th><th>p50</th><th>p90</th><th>p95</th><th>p99</th><th>max</th></tr>";
  for (const Row& row : rows(result)) {
    const Distribution& d = row.values;
    table += fmt::format("<tr><td>{}</td><td>{:.2f}</td><td>{:.2f}</td><td>{:.2f}</td><td>{:.2f}</td><td>{:.2f}</td><td>{:.2f}</td></tr>",
                         row.name, d.mean, d.p50, d.p90, d.p95, d.p99, d.max);
  }
  table += "</table>";
  std::string errors;
  for (const auto& [message, count] : result.errors) errors += fmt::format("<p class=\"bad\">{} × {}</p>", count, escape_html(message));
  return fmt::format(
      "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><title>baton bench serve</title><style>"
      "body{{font:15px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;color:#222}}"
      "table{{border-collapse:collapse}}td,th{{padding:.2em .9em;text-align:right;border-bottom:1px solid #ddd}}"
      "td:first-child{{text-align:left}}svg{{max-width:480px;width:100%;height:auto}}.bad{{color:#b00}}</style></head><body>"
      "<h1>{}</h1><p>{} · ISL {} · OSL {} · {} · {} ok, {} failed, {} left early in {:.1f} s</p>"
      "<p><b>{:.2f}</b> requests/s · <b>{:.1f}</b> output tokens/s · <b>{:.1f}</b> tokens/s in all · goodput <b>{:.2f}</b>/s</p>{}{}<p>{}{}{}{}</p></body></html>\n",
      escape_html(result.model), escape_html(o.url), o.isl, o.osl, load_name(o), result.succeeded, result.failed,
      result.disconnected, result.wall_s, result.requests_per_s, result.output_tokens_per_s, result.total_tokens_per_s,
      result.goodput_per_s, table, errors,
      cumulative_chart("Time to first token", "requests", std::move(ttft)),
      cumulative_chart("Gap between tokens", "gaps", std::move(itl)),
      svg_chart({"Throughput", "seconds into the run", "output tokens/s"}, {timeline}),
      svg_chart({"Time to first token over the run", "seconds into the run", "ms", true}, {thinned(std::move(scatter))}));
}

}  // namespace baton::ops
