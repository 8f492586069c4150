#include <cmath>
#include <nlohmann/json.hpp>

#include "ops/bench_transfer.h"
#include "ops/svg.h"

namespace baton::ops {

using nlohmann::ordered_json;

namespace {

double gb(double bytes_per_s) { return bytes_per_s * 1e-9; }
double mib(uint64_t bytes) { return static_cast<double>(bytes) / (1 << 20); }

std::string what_is_moved(const BenchTransferResult& result) {
  const BenchTransferOptions& o = result.options;
  const std::string where = o.memory == "cuda" ? fmt::format("GPU memory: {} {} {}", result.device, o.operation == "read" ? "from" : "to", result.target_device)
                                               : fmt::format("the target's {}", o.memory);
  return fmt::format("{}pools of {}, {}; blocks drawn anew from all of it for each run; medians of {} runs{}", o.operation == "read" ? "reads; " : "", format_bytes(o.pool_bytes),
                     where, o.runs, o.integrity ? "; integrity mode: every block is hashed on both sides" : "");
}

ordered_json to_json(const Spread& s) { return {{"median", s.median}, {"min", s.min}, {"max", s.max}}; }

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

std::string notifications_line(const BenchPath& path, bool reads) {
  std::string out;
  for (const BenchNotification& n : path.notifications) {
    out += fmt::format("{}{} {} {:.1f} us (p99 {:.1f}, best {:.1f}{})", out.empty() ? "" : "; ", format_bytes(n.bytes),
                       reads ? "read in" : "written and notified", n.p50_us, n.p99_us, n.min_us, n.socket_p50_us > 0 ? fmt::format("; plain socket {:.1f}", n.socket_p50_us) : "");
  }
  return out;
}

std::string round_trip_line(const BenchRoundTrip& r) {
  std::string out = fmt::format("{} written to notification and back: {:.2f} us (runs {:.2f} .. {:.2f}, best {:.2f}, p99 {:.1f})", format_bytes(r.bytes), r.us.median,
                                r.us.min, r.us.max, r.best_us, r.p99_us);
  if (!r.raw_name.empty()) out += fmt::format("; {} {:.2f} ({:.2f} .. {:.2f}), ours / it {:.2f}", r.raw_name, r.raw_us.median, r.raw_us.min, r.raw_us.max, r.ratio);
  return out;
}

std::string costs_line(const BenchPath& path) {
  return fmt::format("agent opened in {:.1f} ms, first block moved {:.1f} ms after connect(), first pass over the pool {:.2f} GB/s; memory added {:.1f} + {:.1f} MiB, "
                     "resident in all {:.0f} + {:.0f} MiB (initiator + target)",
                     path.agent_ms, path.connect_ms, gb(path.first_pass_bytes_per_s), mib(path.initiator_bytes), mib(path.target_bytes), mib(path.initiator_resident_bytes),
                     mib(path.target_resident_bytes));
}

}  // namespace

std::string format_bytes(uint64_t bytes) {
  static constexpr const char* kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  size_t unit = 0;
  while (unit + 1 < std::size(kUnits) && bytes >= 1024 && bytes % 1024 == 0) {
    bytes /= 1024;
    ++unit;
  }
  return fmt::format("{} {}", bytes, kUnits[unit]);
}

std::string bench_transfer_table(const BenchTransferResult& result) {
  std::string out = fmt::format("{} {}; {}\n", result.options.operation == "read" ? "from" : "to", result.target, what_is_moved(result));
  for (const BenchPath& path : result.paths) {
    out += fmt::format("\n{} ({}, {})\n  {}\n", path.transport, path.provider, path.reason, costs_line(path));
    if (!path.notifications.empty()) out += fmt::format("  {}\n", notifications_line(path, result.options.operation == "read"));
    for (const BenchRoundTrip& r : path.round_trips) out += fmt::format("  {}\n", round_trip_line(r));
    out += fmt::format("\n{:<11}{:>9}{:>8}{:>8}{:>16}{:>10}{:>16}{:>9}   {}\n", "order", "block", "blocks", "GB/s", "min .. max", "ms", "CPU s/GB",
                       "retries", "beside: GB/s (ours / it, its CPU s/GB)");
    for (const BenchTransferRow& row : result.rows) {
      if (row.transport != path.transport) continue;
      std::string beside;
      for (const BenchBaseline& b : row.baselines) {
        beside += fmt::format("{}{} {:.2f} ({:.2f}, {:.2f})", beside.empty() ? "" : "  ", b.name, gb(b.bytes_per_s.median), b.ratio, b.cpu_s_per_gb);
      }
      out += fmt::format("{:<11}{:>9}{:>8}{:>8.2f}{:>16}{:>10.3f}{:>16}{:>9}   {}\n", row.order, format_bytes(row.block_bytes), row.blocks,
                         gb(row.bytes_per_s.median), fmt::format("{:.2f} .. {:.2f}", gb(row.bytes_per_s.min), gb(row.bytes_per_s.max)), row.ms,
                         fmt::format("{:.2f} + {:.2f}", row.initiator_cpu_s_per_gb, row.target_cpu_s_per_gb), row.retries, beside);
    }
  }
  if (result.options.verify) out += fmt::format("\n{} blocks compared, all right\n", result.verified_blocks);
  return out;
}

std::string bench_transfer_json(const BenchTransferResult& result) {
  const BenchTransferOptions& o = result.options;
  ordered_json paths = ordered_json::array(), rows = ordered_json::array();
  for (const BenchPath& path : result.paths) {
    ordered_json notifications = ordered_json::array(), round_trips = ordered_json::array();
    for (const BenchRoundTrip& r : path.round_trips) {
      round_trips.push_back({{"bytes", r.bytes}, {"us", to_json(r.us)}, {"best_us", r.best_us}, {"p99_us", r.p99_us}, {"raw_name", r.raw_name},
                             {"raw_us", to_json(r.raw_us)}, {"ratio", r.ratio}});
    }
    for (const BenchNotification& n : path.notifications) {
      notifications.push_back({{"bytes", n.bytes}, {"p50_us", n.p50_us}, {"p99_us", n.p99_us}, {"min_us", n.min_us},
                               {"socket_p50_us", n.socket_p50_us}});
    }
    paths.push_back({{"asked", path.asked}, {"transport", path.transport}, {"provider", path.provider}, {"reason", path.reason},
                     {"agent_ms", path.agent_ms}, {"connect_ms", path.connect_ms}, {"first_pass_bytes_per_s", path.first_pass_bytes_per_s},
                     {"initiator_added_bytes", path.initiator_bytes},
                     {"target_added_bytes", path.target_bytes}, {"initiator_resident_bytes", path.initiator_resident_bytes},
                     {"target_resident_bytes", path.target_resident_bytes}, {"notifications", notifications}, {"round_trips", round_trips}});
  }
  for (const BenchTransferRow& row : result.rows) {
    ordered_json baselines = ordered_json::array();
    for (const BenchBaseline& b : row.baselines) {
      baselines.push_back({{"name", b.name}, {"bytes_per_s", to_json(b.bytes_per_s)}, {"ratio", b.ratio}, {"cpu_s_per_gb", b.cpu_s_per_gb}});
    }
    rows.push_back({{"transport", row.transport}, {"order", row.order}, {"block_bytes", row.block_bytes}, {"blocks", row.blocks},
                    {"bytes_per_s", to_json(row.bytes_per_s)}, {"ms", row.ms}, {"initiator_cpu_s_per_gb", row.initiator_cpu_s_per_gb},
                    {"target_cpu_s_per_gb", row.target_cpu_s_per_gb}, {"retries", row.retries}, {"baselines", baselines}});
  }
  ordered_json out = {{"target", result.target}, {"operation", o.operation}, {"pool_bytes", o.pool_bytes}, {"memory", o.memory}, {"device", result.device}, {"target_device", result.target_device}, {"runs", o.runs}, {"integrity", o.integrity}, {"seed", o.seed},
                      {"verified_blocks", result.verified_blocks}, {"paths", paths}, {"rows", rows}};
  return out.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
}

std::string bench_transfer_html(const BenchTransferResult& result) {
  std::string body;
  for (const BenchPath& path : result.paths) {
    body += fmt::format("<h2>{} <small>({}, {})</small></h2><p>{}</p><p>{}</p>", escape_html(path.transport), escape_html(path.provider),
                        escape_html(path.reason), costs_line(path), notifications_line(path, result.options.operation == "read"));
    for (const BenchRoundTrip& r : path.round_trips) body += fmt::format("<p>{}</p>", round_trip_line(r));
    std::string pictures;
    for (const char* order : {"scattered", "contiguous"}) {
      std::vector<Series> lines = {{"baton", {}}};
      std::string table;
      for (const BenchTransferRow& row : result.rows) {
        if (row.transport != path.transport || row.order != order) continue;
        double x = std::log2(static_cast<double>(row.block_bytes) / 1024);
        lines[0].points.push_back({x, gb(row.bytes_per_s.median)});
        std::string beside;
        for (size_t i = 0; i < row.baselines.size(); ++i) {
          const BenchBaseline& b = row.baselines[i];
          if (lines.size() <= i + 1) lines.push_back({b.name, {}});
          lines[i + 1].points.push_back({x, gb(b.bytes_per_s.median)});
          beside += fmt::format("<td>{:.2f}</td><td>{:.2f}</td>", gb(b.bytes_per_s.median), b.ratio);
        }
        table += fmt::format("<tr><td>{}</td><td>{}</td><td>{:.2f}</td><td>{:.2f} … {:.2f}</td><td>{:.3f}</td><td>{:.2f} + {:.2f}</td><td>{}</td>{}</tr>",
                             format_bytes(row.block_bytes), row.blocks, gb(row.bytes_per_s.median), gb(row.bytes_per_s.min), gb(row.bytes_per_s.max),
                             row.ms, row.initiator_cpu_s_per_gb, row.target_cpu_s_per_gb, row.retries, beside);
      }
      if (table.empty()) continue;
      std::string header = "<tr><th>block</th><th>blocks</th><th>GB/s</th><th>min … max</th><th>ms</th><th>CPU s/GB, initiator + target</th><th>retries</th>";
      for (size_t i = 1; i < lines.size(); ++i) header += fmt::format("<th>{} GB/s</th><th>ours / it</th>", escape_html(lines[i].name));
      body += fmt::format("<h3>{}</h3><table>{}</tr>{}</table>", order, header, table);
      pictures += svg_chart({fmt::format("{}, {}", path.transport, order), "block size: 2 to the power of x KiB", "GB/s"}, lines);
    }
    body += pictures;
  }
  if (result.options.verify) body += fmt::format("<p>{} blocks compared, all right</p>", result.verified_blocks);
  return fmt::format(
      "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><title>baton bench transfer</title><style>"
      "body{{font:15px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;color:#222}}"
      "table{{border-collapse:collapse}}td,th{{padding:.2em .7em;text-align:right;border-bottom:1px solid #ddd}}"
      "td:first-child{{text-align:left}}svg{{max-width:480px;width:100%;height:auto}}</style></head><body>"
      "<h1>baton bench transfer</h1><p>{} {}; {}</p>{}</body></html>\n",
      result.options.operation == "read" ? "from" : "to", escape_html(result.target), escape_html(what_is_moved(result)), body);
}

}  // namespace baton::ops
