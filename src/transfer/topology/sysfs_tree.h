#pragma once

#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "transfer/topology/topology.h"

namespace baton::transfer {

/// A sysfs of files and symbolic links in a temporary directory, laid out as Linux lays it out, for tests.
/// The machines in testdata/ are written in short form, one device per line:
///
///   node ID cpus=0-47 gib=1000
///   gpu  PATH device=0x2330 node=0
///   rdma PATH name=mlx5_0 vendor=0x15b3 device=0x1021 driver=mlx5_core node=0 state=4:_ACTIVE
///        rate=400_Gb/sec_(4X_NDR) layer=InfiniBand [net=ibp24s0] uverbs=0
///   net  PATH name=eth0 node=0 state=up mbit=25000 [route=1]
///
/// PATH is the way below /sys/devices, bridges included; "_" stands for a space in rate and state.
class SysfsTree {
 public:
  SysfsTree();
  ~SysfsTree();
  SysfsTree(const SysfsTree&) = delete;
  SysfsTree& operator=(const SysfsTree&) = delete;

  /// `machine`: "p5_48xlarge"
  void load(const std::string& machine);
  /// One line of that form; empty lines and comments are nothing.
  void add(std::string_view line);

  const std::string& root() const { return root_; }
  /// Paths are below the root; directories on the way are made.
  void write(const std::string& path, const std::string& text);
  void link(const std::string& path, const std::string& target);
  void remove(const std::string& path);
  void make_directory(const std::string& path);
  /// Every file, link and directory, sorted: what a fuzzer may break.
  std::vector<std::string> entries() const;

 private:
  using Fields = std::map<std::string, std::string>;
  void add_pci(const std::string& path, const std::string& vendor, const std::string& device,
               const std::string& pci_class, const std::string& node);
  void add_interface(const std::string& path, const std::string& name, const std::string& type,
                     const std::string& state, const std::string& mbit);
  void add_rdma(const std::string& path, const Fields& fields);

  std::string root_;
};

/// The topology of a machine of testdata/; laid out and read once per process.
const Topology& machine(std::string_view name);

}  // namespace baton::transfer
