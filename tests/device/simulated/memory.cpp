// The simulated accelerator's memory with its limit and counters, its streams with their order, and what PyTorch asks a
// device for: a guard for devices, streams and events, and hooks for pinned memory.
//
// Every operation runs at once, so that a forgotten wait gives the right numbers. It is found by vector clocks: a stream
// has a clock for itself and knows up to where it has waited for each other stream; a buffer remembers who wrote it, and
// who has read it since. An access that is not after those is an error (C. J. Fidge, 1988; FastTrack, PLDI 2009).
// Freed memory is given out again at once, as by CUDA's caching allocator: to the stream that it was allocated on. What
// is allocated next there inherits the accesses that are not over.

#include "accelerator.h"

#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#ifdef __GLIBC__
#include <malloc.h>
#endif
#include <sys/mman.h>

#include <array>
#include <climits>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <sstream>

namespace simulated {
namespace {

constexpr int kDevices = 2;
constexpr int kUninitialized = 0xFF; // NaN in every float type

struct Counters {
  int64_t limit = INT64_MAX;
  int64_t allocated = 0, peak = 0, blocks = 0;
  int64_t to_device = 0, to_host = 0, between = 0;
};

using Clock = std::vector<uint64_t>; // by stream

// Addresses of a device that have memory page by page, when it is given to them, as by CUDA's cuMemMap. Two views that
// begin at one address are one buffer.
struct Region {
  int device = 0;
  size_t page = 0;
  std::vector<bool> backed; // by page
  std::map<uintptr_t, std::shared_ptr<History>> histories;
};

std::recursive_mutex mutex;
std::array<Counters, kDevices> counters;
std::vector<Clock> clocks(kDevices, Clock(kDevices)); // the default streams are the first
std::vector<int> stream_devices = {0, 1};
Clock host(kDevices);
std::map<int, std::vector<Access>> given_back; // by the stream that memory goes back to: accesses that may not be over
std::map<uintptr_t, size_t> pinned;
std::map<uintptr_t, Region> regions; // by their first address, for as long as the process lives

thread_local int current_device = 0;
thread_local std::array<int, kDevices> current_stream = {0, 1};

using Lock = std::lock_guard<std::recursive_mutex>;

std::string name_of(int stream) {
  std::ostringstream text;
  text << "stream " << stream << " of simulated:" << stream_devices.at(stream);
  return text.str();
}

void join(Clock& clock, const Clock& other) {
  clock.resize(std::max(clock.size(), other.size()));
  for (size_t i = 0; i < other.size(); i++)
    clock[i] = std::max(clock[i], other[i]);
}

bool is_after(const Clock& clock, int stream, Access access) {
  return access.stream < 0 || access.stream == stream ||
      (access.stream < static_cast<int>(clock.size()) && clock[access.stream] >= access.time);
}

void take(int device, size_t bytes) {
  auto& counter = counters.at(device);
  TORCH_CHECK_WITH(
      OutOfMemoryError,
      counter.allocated + static_cast<int64_t>(bytes) <= counter.limit,
      "simulated:", device, " is out of memory: tried to allocate ", bytes, " bytes, and ", counter.allocated, " of ",
      counter.limit, " are in use");
  counter.allocated += bytes;
  counter.peak = std::max(counter.peak, counter.allocated);
  counter.blocks++;
}

std::pair<uintptr_t, Region&> region_at(uintptr_t address) {
  auto found = regions.upper_bound(address);
  TORCH_CHECK(found != regions.begin(), "there is no reserved memory at ", address);
  --found;
  return {found->first, found->second};
}

void check_backed(const Block& block, const std::string& name) {
  auto address = reinterpret_cast<uintptr_t>(block.data);
  auto [base, region] = region_at(address);
  for (size_t page = (address - base) / region.page; page * region.page < address - base + block.bytes; page++)
    TORCH_CHECK(
        region.backed.at(page), name, " uses a buffer of ", block.bytes, " bytes whose memory has been taken away");
}

void inherit(Block& block) {
  auto found = given_back.find(block.stream);
  if (found == given_back.end())
    return;
  std::vector<Access> open;
  for (auto access : found->second)
    if (!is_after(clocks[block.stream], block.stream, access))
      open.push_back(access);
  found->second = open;
  block.history->reads = open;
}

void release(void* context) {
  Lock lock(mutex);
  auto* block = static_cast<Block*>(context);
  if (block->reserved) {
    delete block;
    return;
  }
  auto& open = given_back[block->stream];
  auto give_back = [&](Access access) {
    bool recorded = std::count(block->recorded.begin(), block->recorded.end(), access.stream);
    if (!recorded && !is_after(clocks[block->stream], block->stream, access))
      open.push_back(access);
  };
  give_back(block->history->write);
  for (auto access : block->history->reads)
    give_back(access);
  counters.at(block->device).allocated -= block->bytes;
  counters.at(block->device).blocks--;
  if (!block->made_by_kernel)
    std::free(block->data);
  delete block;
}

c10::DataPtr as_pointer(Block* block) {
  return {block->data, block, &release, c10::Device(kType, static_cast<c10::DeviceIndex>(block->device))};
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    Lock lock(mutex);
    take(current_device, bytes);
    auto* block = new Block;
    block->data = bytes ? std::aligned_alloc(64, (bytes + 63) / 64 * 64) : nullptr;
    block->bytes = bytes;
    block->device = current_device;
    block->stream = current_stream[current_device];
    inherit(*block);
    if (bytes)
      std::memset(block->data, kUninitialized, bytes);
    return as_pointer(block);
  }

  c10::DeleterFnPtr raw_deleter() const override {
    return nullptr;
  }

  void copy_data(void* target, const void* source, size_t bytes) const override {
    default_copy_data(target, source, bytes);
  }
};

struct PinnedAllocator final : c10::Allocator {
  static void release(void* data) {
    Lock lock(mutex);
    pinned.erase(reinterpret_cast<uintptr_t>(data));
    std::free(data);
  }

  c10::DataPtr allocate(size_t bytes) override {
    Lock lock(mutex);
    void* data = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    pinned[reinterpret_cast<uintptr_t>(data)] = bytes;
    return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override {
    return &release;
  }

  void copy_data(void* target, const void* source, size_t bytes) const override {
    default_copy_data(target, source, bytes);
  }
};

Allocator the_allocator;
PinnedAllocator the_pinned_allocator;
REGISTER_ALLOCATOR(kType, &the_allocator);

int slot(const c10::Stream& stream) {
  return stream.id() == 0 ? stream.device_index() : static_cast<int>(stream.id());
}

c10::Stream as_stream(int stream) {
  c10::Device device(kType, static_cast<c10::DeviceIndex>(stream_devices.at(stream)));
  return c10::Stream(c10::Stream::UNSAFE, device, stream < kDevices ? 0 : stream);
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override {
    return kType;
  }
  c10::Device exchangeDevice(c10::Device device) const override {
    auto before = getDevice();
    setDevice(device);
    return before;
  }
  c10::Device getDevice() const override {
    return {kType, static_cast<c10::DeviceIndex>(current_device)};
  }
  void setDevice(c10::Device device) const override {
    TORCH_CHECK(device.index() < kDevices, "there is no ", device);
    uncheckedSetDevice(device);
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.index() >= 0)
      current_device = device.index();
  }
  c10::Stream getStream(c10::Device device) const override {
    return as_stream(current_stream[device.has_index() ? device.index() : current_device]);
  }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return as_stream(device.has_index() ? device.index() : current_device);
  }
  c10::Stream getNewStream(c10::Device device, int) const override {
    Lock lock(mutex);
    stream_devices.push_back(device.has_index() ? device.index() : current_device);
    clocks.emplace_back();
    return as_stream(static_cast<int>(stream_devices.size()) - 1);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override {
    return getNewStream(device, 0);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    auto before = as_stream(current_stream.at(stream.device_index()));
    current_stream.at(stream.device_index()) = slot(stream);
    return before;
  }
  void record(void** event, const c10::Stream& stream, c10::DeviceIndex, c10::EventFlag) const override {
    Lock lock(mutex);
    if (!*event)
      *event = new Clock;
    *static_cast<Clock*>(*event) = clocks[slot(stream)];
  }
  void block(void* event, const c10::Stream& stream) const override {
    Lock lock(mutex);
    if (event)
      join(clocks[slot(stream)], *static_cast<Clock*>(event));
  }
  void destroyEvent(void* event, c10::DeviceIndex) const noexcept override {
    delete static_cast<Clock*>(event);
  }
  bool queryEvent(void*) const override {
    return true;
  }
  void synchronizeEvent(void* event) const override {
    Lock lock(mutex);
    if (event)
      join(host, *static_cast<Clock*>(event));
  }
  bool queryStream(const c10::Stream&) const override {
    return true;
  }
  void synchronizeStream(const c10::Stream& stream) const override {
    synchronize(slot(stream));
  }
  void synchronizeDevice(c10::DeviceIndex device) const override {
    Lock lock(mutex);
    for (size_t stream = 0; stream < clocks.size(); stream++)
      if (stream_devices[stream] == device)
        synchronize(static_cast<int>(stream));
  }
  void recordDataPtrOnStream(const c10::DataPtr& memory, const c10::Stream& stream) const override {
    Lock lock(mutex);
    static_cast<Block*>(memory.get_context())->recorded.push_back(slot(stream));
  }
  c10::DeviceIndex deviceCount() const noexcept override {
    return kDevices;
  }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return true;
  }
  bool hasPrimaryContext(c10::DeviceIndex) const override {
    return true;
  }
  c10::DeviceIndex deviceCount() const override {
    return kDevices;
  }
  c10::DeviceIndex getCurrentDevice() const override {
    return static_cast<c10::DeviceIndex>(current_device);
  }
  void setCurrentDevice(c10::DeviceIndex device) const override {
    current_device = device;
  }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override {
    return static_cast<c10::DeviceIndex>(std::exchange(current_device, device));
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override {
    return exchangeDevice(device);
  }
  bool isPinnedPtr(const void* data) const override {
    return is_pinned(data);
  }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    return &the_pinned_allocator;
  }
};

} // namespace

c10::Allocator* allocator() {
  return &the_allocator;
}

c10::DataPtr adopt(c10::DataPtr memory, size_t bytes, int device) {
  Lock lock(mutex);
  take(device, bytes);
  auto* block = new Block;
  block->data = memory.get();
  block->bytes = bytes;
  block->device = device;
  block->stream = current_stream[device];
  block->made_by_kernel = std::move(memory);
  inherit(*block);
  return as_pointer(block);
}

c10::DataPtr view_of(uintptr_t address, size_t bytes) {
  Lock lock(mutex);
  auto [base, region] = region_at(address);
  TORCH_CHECK(address - base + bytes <= region.backed.size() * region.page, "a view beyond the reserved memory");
  auto& history = region.histories[address];
  if (!history)
    history = std::make_shared<History>();
  auto* block = new Block;
  block->data = reinterpret_cast<void*>(address);
  block->bytes = bytes;
  block->device = region.device;
  block->reserved = true;
  block->history = history;
  return as_pointer(block);
}

Block& block_of(const c10::Storage& storage) {
  return *static_cast<Block*>(storage.data_ptr().get_context());
}

int begin(int device) {
  Lock lock(mutex);
  int stream = current_stream.at(device);
  auto& clock = clocks[stream];
  join(clock, host);
  clock.resize(std::max<size_t>(clock.size(), stream + 1));
  clock[stream]++;
  return stream;
}

void touch(Block& block, int stream, bool writes, const std::string& name) {
  Lock lock(mutex);
  const auto& clock = clocks[stream];
  auto check = [&](Access access, const char* did) {
    TORCH_CHECK(
        is_after(clock, stream, access),
        name, " on ", name_of(stream), writes ? " writes" : " reads", " a buffer of ", block.bytes, " bytes that ",
        name_of(access.stream), " ", did, ", and has not waited for that stream");
  };
  if (block.reserved)
    check_backed(block, name);
  auto& history = *block.history;
  check(history.write, "has written");
  if (writes) {
    for (auto access : history.reads)
      check(access, "reads, or did when the memory was given back");
    history.reads.clear();
    history.write = {stream, clock[stream]};
    return;
  }
  for (auto& access : history.reads)
    if (access.stream == stream) {
      access.time = clock[stream];
      return;
    }
  history.reads.push_back({stream, clock[stream]});
}

void synchronize(int stream) {
  Lock lock(mutex);
  join(host, clocks[stream]);
}

void wait(int stream, int other) {
  Lock lock(mutex);
  join(clocks[stream], clocks[other]);
}

void count_to_device(size_t bytes, int device) {
  Lock lock(mutex);
  counters.at(device).to_device += bytes;
}

void count_to_host(size_t bytes, int device) {
  Lock lock(mutex);
  counters.at(device).to_host += bytes;
}

void count_between(size_t bytes, int device) {
  Lock lock(mutex);
  counters.at(device).between += bytes;
}

bool is_pinned(const void* data) {
  Lock lock(mutex);
  auto address = reinterpret_cast<uintptr_t>(data);
  auto found = pinned.upper_bound(address);
  return found != pinned.begin() && address < (--found)->first + found->second;
}

} // namespace simulated

// What Python calls, by ctypes.
extern "C" {

void simulated_register() {
  // Memory of large tensors is kept by malloc: given back, every byte of it is a page fault again.
#ifdef __GLIBC__
  mallopt(M_MMAP_THRESHOLD, 1 << 30);
  mallopt(M_TRIM_THRESHOLD, INT_MAX);
#endif
  static simulated::Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
}

void simulated_set_limit(int device, int64_t bytes) {
  simulated::Lock lock(simulated::mutex);
  simulated::counters.at(device).limit = bytes;
}

// limit, allocated, peak, blocks, to_device, to_host, between
void simulated_counters(int device, int64_t* out) {
  simulated::Lock lock(simulated::mutex);
  const auto& c = simulated::counters.at(device);
  for (auto value : {c.limit, c.allocated, c.peak, c.blocks, c.to_device, c.to_host, c.between})
    *out++ = value;
}

// The peak becomes what is allocated, and the copied bytes 0.
void simulated_reset(int device) {
  simulated::Lock lock(simulated::mutex);
  auto& c = simulated::counters.at(device);
  c.peak = c.allocated;
  c.to_device = c.to_host = c.between = 0;
}

int simulated_current_device() {
  return simulated::current_device;
}

void simulated_set_device(int device) {
  simulated::current_device = device;
}

void simulated_pin(uintptr_t address, size_t bytes) {
  simulated::Lock lock(simulated::mutex);
  simulated::pinned[address] = bytes;
}

// Whether it was pinned.
int simulated_unpin(uintptr_t address) {
  simulated::Lock lock(simulated::mutex);
  return static_cast<int>(simulated::pinned.erase(address));
}

// Addresses for so many bytes of a device; 0 where there are none.
uintptr_t simulated_reserve(int device, size_t bytes, size_t page) {
  simulated::Lock lock(simulated::mutex);
  size_t pages = (bytes + page - 1) / page;
  void* base = mmap(
      nullptr, std::max<size_t>(pages, 1) * page, PROT_READ | PROT_WRITE,
      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED)
    return 0;
  auto address = reinterpret_cast<uintptr_t>(base);
  simulated::regions[address] = {device, page, std::vector<bool>(pages), {}};
  return address;
}

// Gives a page of reserved addresses memory, or takes it away with what is in it. 0: the device has none left.
int simulated_back(uintptr_t base, size_t index, int backed) {
  simulated::Lock lock(simulated::mutex);
  auto& region = simulated::regions.at(base);
  auto& counter = simulated::counters.at(region.device);
  auto size = static_cast<int64_t>(region.page);
  if (region.backed.at(index) == static_cast<bool>(backed))
    return 1;
  if (backed && counter.allocated + size > counter.limit)
    return 0;
  region.backed[index] = backed;
  counter.allocated += backed ? size : -size;
  counter.peak = std::max(counter.peak, counter.allocated);
  void* data = reinterpret_cast<void*>(base + index * region.page);
  if (backed)
    std::memset(data, simulated::kUninitialized, region.page);
  else
    madvise(data, region.page, MADV_DONTNEED);
  return 1;
}
}
