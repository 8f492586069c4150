#pragma once

#include <string>
#include <utility>
#include <vector>

namespace baton::ops {

struct Series {
  std::string name;
  std::vector<std::pair<double, double>> points;  ///< (x, y), x ascending for lines
};

struct ChartLabels {
  std::string title, x, y;
  bool dots = false;  ///< points instead of a line
};

/// A small chart with axes from zero, as a self-contained <svg>. Series of no points give an empty frame.
std::string svg_chart(const ChartLabels& labels, const std::vector<Series>& series);

}  // namespace baton::ops
