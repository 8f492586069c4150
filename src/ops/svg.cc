#include "ops/svg.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>

namespace baton::ops {

namespace {

constexpr double kWidth = 480, kHeight = 300, kLeft = 58, kRight = 14, kTop = 30, kBottom = 44;

/// A round number of about a fifth of `range`.
double tick_step(double range) {
  double raw = range / 5, magnitude = std::pow(10.0, std::floor(std::log10(raw)));
  for (double factor : {1.0, 2.0, 5.0, 10.0}) {
    if (raw <= factor * magnitude) return factor * magnitude;
  }
  return 10 * magnitude;
}

}  // namespace

std::string svg_chart(const ChartLabels& labels, const std::vector<Series>& series) {
  static constexpr std::array<const char*, 4> kColors = {"#1f6feb", "#d1491b", "#1a7f37", "#8250df"};
  double max_x = 0, max_y = 0;
  for (const Series& line : series) {
    for (auto [x, y] : line.points) {
      max_x = std::max(max_x, x);
      max_y = std::max(max_y, y);
    }
  }
  if (!(max_x > 0)) max_x = 1;
  if (!(max_y > 0)) max_y = 1;
  double step_x = tick_step(max_x), step_y = tick_step(max_y);
  max_x = std::ceil(max_x / step_x) * step_x;
  max_y = std::ceil(max_y / step_y) * step_y;
  auto px = [&](double x) { return kLeft + x / max_x * (kWidth - kLeft - kRight); };
  auto py = [&](double y) { return kHeight - kBottom - y / max_y * (kHeight - kTop - kBottom); };

  std::string out = fmt::format(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {} {}\" font-family=\"system-ui,sans-serif\" font-size=\"11\">"
      "<text x=\"{}\" y=\"18\" font-size=\"13\" font-weight=\"600\">{}</text>", kWidth, kHeight, kLeft, labels.title);
  for (double x = 0; x <= max_x * 1.0001; x += step_x) {
    out += fmt::format("<line x1=\"{0:.1f}\" x2=\"{0:.1f}\" y1=\"{1}\" y2=\"{2}\" stroke=\"#eee\"/>"
                       "<text x=\"{0:.1f}\" y=\"{3}\" text-anchor=\"middle\" fill=\"#555\">{4:g}</text>",
                       px(x), kTop, kHeight - kBottom, kHeight - kBottom + 15, x);
  }
  for (double y = 0; y <= max_y * 1.0001; y += step_y) {
    out += fmt::format("<line x1=\"{0}\" x2=\"{1}\" y1=\"{2:.1f}\" y2=\"{2:.1f}\" stroke=\"#eee\"/>"
                       "<text x=\"{3}\" y=\"{4:.1f}\" text-anchor=\"end\" fill=\"#555\">{5:g}</text>",
                       kLeft, kWidth - kRight, py(y), kLeft - 6, py(y) + 4, y);
  }
  out += fmt::format("<path d=\"M{} {}V{}H{}\" fill=\"none\" stroke=\"#999\"/>", kLeft, kTop, kHeight - kBottom, kWidth - kRight);
  out += fmt::format("<text x=\"{:.0f}\" y=\"{}\" text-anchor=\"middle\" fill=\"#555\">{}</text>"
                     "<text transform=\"translate(14 {:.0f}) rotate(-90)\" text-anchor=\"middle\" fill=\"#555\">{}</text>",
                     (kLeft + kWidth - kRight) / 2, kHeight - 10, labels.x, (kTop + kHeight - kBottom) / 2, labels.y);
  for (size_t i = 0; i < series.size(); ++i) {
    const char* color = kColors[i % kColors.size()];
    if (labels.dots) {
      for (auto [x, y] : series[i].points) {
        out += fmt::format("<circle cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"2\" fill=\"{}\" fill-opacity=\"0.6\"/>", px(x), py(y), color);
      }
    } else if (!series[i].points.empty()) {
      out += fmt::format("<polyline fill=\"none\" stroke=\"{}\" stroke-width=\"2\" points=\"", color);
      for (auto [x, y] : series[i].points) out += fmt::format("{:.1f},{:.1f} ", px(x), py(y));
      out += "\"/>";
    }
    if (series.size() > 1) {
      out += fmt::format("<text x=\"{}\" y=\"{}\" text-anchor=\"end\" fill=\"{}\">{}</text>", kWidth - kRight, kTop + 14 + 14 * static_cast<double>(i), color, series[i].name);
    }
  }
  return out + "</svg>";
}

}  // namespace baton::ops
