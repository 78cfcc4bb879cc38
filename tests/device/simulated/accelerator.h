// What the two halves of the simulated accelerator share: memory and streams (memory.cpp), operators (operators.cpp).
#pragma once

#include <c10/core/Allocator.h>
#include <c10/core/Storage.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace simulated {

constexpr auto kType = c10::DeviceType::PrivateUse1;

// The stream that touched a buffer, and that stream's clock when it did.
struct Access {
  int stream = -1;
  uint64_t time = 0;
};

// The accesses that the next one has to come after: the last write, and the reads since then, one a stream.
struct History {
  Access write;
  std::vector<Access> reads;
};

// A piece of a device's memory. The data lies in main memory, where the operators find it.
struct Block {
  void* data = nullptr;
  size_t bytes = 0;
  int device = 0;
  int stream = 0;              // that it was allocated on
  c10::DataPtr made_by_kernel; // where a CPU kernel made its own result, the memory that it made
  std::vector<int> recorded;   // streams that Tensor.record_stream named
  bool reserved = false;       // a view on a Region, which counts its memory itself
  std::shared_ptr<History> history = std::make_shared<History>();
};

c10::Allocator* allocator();

// Memory that a CPU kernel allocated for its result, as the device's: counted, and refused when it is too much.
c10::DataPtr adopt(c10::DataPtr memory, size_t bytes, int device);

Block& block_of(const c10::Storage& storage);

// A view on addresses that `simulated_reserve` gave.
c10::DataPtr view_of(uintptr_t address, size_t bytes);

// The current stream of a device, for one more operation.
int begin(int device);

// The operation `name` on a stream reads or writes a block. Throws where it has not waited for another stream.
void touch(Block& block, int stream, bool writes, const std::string& name);

// All work of a stream is done before anything that the host starts from now on.
void synchronize(int stream);

// One stream waits for all that another has been given.
void wait(int stream, int other);

void count_to_device(size_t bytes, int device);
void count_to_host(size_t bytes, int device);
void count_between(size_t bytes, int device);

bool is_pinned(const void* data);

} // namespace simulated
