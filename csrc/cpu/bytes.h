// Little-endian byte strings for statistics that leave the process.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace mergekernels {

class Writer {
 public:
  explicit Writer(const char* magic) : data_(magic, 8) {}
  void put(std::uint64_t x) {
    for (int i = 0; i < 8; ++i) data_.push_back(static_cast<char>(x >> (8 * i)));
  }
  void put_signed(std::int64_t x) { put(static_cast<std::uint64_t>(x)); }
  std::string take() { return std::move(data_); }

 private:
  std::string data_;
};

class Parser {
 public:
  Parser(const std::string& data, const char* magic) : data_(data), at_(8) {
    if (data.size() < 8 || std::memcmp(data.data(), magic, 8) != 0) fail();
  }
  std::uint64_t get() {
    if (data_.size() - at_ < 8) fail();
    std::uint64_t x = 0;
    for (int i = 0; i < 8; ++i) x |= std::uint64_t(static_cast<unsigned char>(data_[at_ + std::size_t(i)])) << (8 * i);
    at_ += 8;
    return x;
  }
  std::int64_t get_signed() { return static_cast<std::int64_t>(get()); }
  // A number of items that follow, `words` numbers each.
  std::int64_t get_count(std::uint64_t words) {
    const std::uint64_t count = get();
    if (count > (data_.size() - at_) / (8 * words)) fail();
    return static_cast<std::int64_t>(count);
  }
  void end() const {
    if (at_ != data_.size()) fail();
  }
  [[noreturn]] static void fail() { throw std::invalid_argument("these bytes are not dumped statistics of this kind"); }

 private:
  const std::string& data_;
  std::size_t at_;
};

}  // namespace mergekernels
