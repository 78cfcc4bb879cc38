// The simulated accelerator's operators: PyTorch's own for CPUs, on the same bytes.
//
// An operator without a kernel of its own is called with CPU tensors that share the storages of its arguments. What it
// returns goes back: an argument as the argument itself, a view as a view on the argument's storage, new memory as the
// device's. Before that it is checked that all tensors are on one device, and that the stream may touch their memory.
// A CPU tensor of one number may stand among a device's, and the indices of indexing, as on CUDA.

#include "accelerator.h"

#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/TensorImpl.h>
#include <torch/library.h>

namespace simulated {
namespace {

using c10::IntArrayRef;
template <class T>
using Optional = std::optional<T>;

constexpr auto kCPU = c10::DeviceType::CPU;

bool is_here(const at::Tensor& tensor) {
  return tensor.defined() && tensor.device().type() == kType;
}

at::Tensor with_storage(c10::Storage storage, c10::DispatchKey key, const at::Tensor& like) {
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return tensor;
}

// One call of an operator: its arguments on the CPU, and the way back.
class Call {
 public:
  explicit Call(std::string name) : name_(std::move(name)) {}

  at::Tensor to_cpu(const at::Tensor& tensor, bool written) {
    if (!tensor.defined())
      return tensor;
    if (!is_here(tensor)) {
      others_.emplace_back(tensor, written);
      return tensor;
    }
    on(tensor.device());
    for (auto& argument : arguments_)
      if (argument.device.is_same(tensor)) {
        argument.written |= written;
        return argument.cpu;
      }
    auto cpu = with_storage(cpu_storage(tensor.storage()), c10::DispatchKey::CPU, tensor);
    arguments_.push_back({tensor, cpu, written});
    return cpu;
  }

  void on(c10::Device device) {
    TORCH_CHECK(
        device_.type() == kCPU || device_ == device,
        name_, ": expected all tensors on one device, found ", device_, " and ", device);
    device_ = device;
  }

  void begin() {
    if (device_.type() == kCPU)
      return;
    bool indexes = name_ == "aten::index" || name_ == "aten::index_put_" || name_ == "aten::_index_put_impl_";
    for (const auto& [tensor, written] : others_)
      TORCH_CHECK(
          tensor.device().type() == kCPU && !written && (tensor.dim() == 0 || (indexes && !tensor.is_floating_point())),
          name_, ": expected all tensors on one device, found ", device_, " and ", tensor.device());
    int stream = simulated::begin(device_.index());
    for (bool writes : {false, true})
      for (auto& argument : arguments_)
        if (argument.written == writes && argument.device.storage().nbytes())
          touch(block_of(argument.device.storage()), stream, writes, name_);
    stream_ = stream;
  }

  // Sizes and memory of arguments that the operator resized.
  void end() {
    for (auto& argument : arguments_)
      if (argument.written)
        resized(argument.device, argument.cpu);
  }

  at::Tensor to_device(const at::Tensor& tensor) {
    if (!tensor.defined() || tensor.device().type() != kCPU || device_.type() == kCPU)
      return tensor;
    for (auto& argument : arguments_)
      if (argument.cpu.is_same(tensor))
        return argument.device;
    for (auto& [other, written] : others_)
      if (other.is_same(tensor))
        return tensor;
    return with_storage(device_storage(tensor.storage()), c10::DispatchKey::PrivateUse1, tensor);
  }

 private:
  struct Argument {
    at::Tensor device, cpu;
    bool written;
  };

  c10::Storage cpu_storage(const c10::Storage& storage) {
    for (auto& [device, cpu] : storages_)
      if (device.is_alias_of(storage))
        return cpu;
    c10::Storage cpu(
        c10::Storage::use_byte_size_t(),
        storage.nbytes(),
        c10::DataPtr(storage.mutable_data(), c10::Device(kCPU)),
        c10::GetCPUAllocator(),
        /*resizable=*/true);
    storages_.emplace_back(storage, cpu);
    return cpu;
  }

  c10::Storage device_storage(const c10::Storage& storage) {
    for (auto& [device, cpu] : storages_)
      if (cpu.is_alias_of(storage))
        return device;
    auto bytes = storage.nbytes();
    auto memory = adopt(storage.unsafeGetStorageImpl()->set_data_ptr(c10::DataPtr()), bytes, device_.index());
    c10::Storage device(c10::Storage::use_byte_size_t(), bytes, std::move(memory), allocator(), /*resizable=*/true);
    if (bytes)
      touch(block_of(device), stream_, /*writes=*/true, name_);
    storages_.emplace_back(device, storage);
    return device;
  }

  void resized(const at::Tensor& tensor, const at::Tensor& cpu) {
    auto* impl = tensor.storage().unsafeGetStorageImpl();
    if (cpu.storage().data() != impl->data()) {
      auto bytes = cpu.storage().nbytes();
      auto* made = cpu.storage().unsafeGetStorageImpl();
      impl->set_data_ptr(adopt(made->set_data_ptr(c10::DataPtr()), bytes, device_.index()));
      impl->set_nbytes(bytes);
      if (bytes)
        touch(block_of(tensor.storage()), stream_, /*writes=*/true, name_);
    }
    if (cpu.sizes() != tensor.sizes() || cpu.strides() != tensor.strides())
      tensor.unsafeGetTensorImpl()->set_sizes_and_strides(cpu.sizes(), cpu.strides(), cpu.storage_offset());
  }

  std::string name_;
  c10::Device device_{kCPU};
  int stream_ = 0;
  std::vector<Argument> arguments_;
  std::vector<std::pair<at::Tensor, bool>> others_;
  std::vector<std::pair<c10::Storage, c10::Storage>> storages_; // of the device, of the CPU
};

void on_the_cpu(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  Call call(schema.name());
  const auto first = stack->size() - schema.arguments().size();
  for (size_t i = 0; i < schema.arguments().size(); i++) {
    auto& value = (*stack)[first + i];
    const auto* alias = schema.arguments()[i].alias_info();
    const bool written = alias && alias->isWrite();
    if (value.isTensor()) {
      value = call.to_cpu(value.toTensor(), written);
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> tensors;
      for (const at::Tensor& tensor : value.toTensorVector())
        tensors.push_back(call.to_cpu(tensor, written));
      value = tensors;
    } else if (value.isOptionalTensorList()) {
      c10::List<Optional<at::Tensor>> tensors;
      for (const Optional<at::Tensor>& tensor : value.toOptionalTensorVector())
        tensors.push_back(tensor ? Optional<at::Tensor>(call.to_cpu(*tensor, written)) : std::nullopt);
      value = tensors;
    } else if (value.isDevice() && value.toDevice().type() == kType) {
      call.on(value.toDevice());
      value = c10::Device(kCPU);
    }
  }
  call.begin();
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  }
  call.end();
  const auto returned = stack->size() - schema.returns().size();
  for (size_t i = returned; i < stack->size(); i++) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      value = call.to_device(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> tensors;
      for (const at::Tensor& tensor : value.toTensorVector())
        tensors.push_back(call.to_device(tensor));
      value = tensors;
    }
  }
}

at::Tensor empty(
    IntArrayRef size,
    Optional<c10::ScalarType> dtype,
    Optional<c10::Layout>,
    Optional<c10::Device> device,
    Optional<bool>,
    Optional<c10::MemoryFormat> format) {
  const c10::OptionalDeviceGuard guard(device);
  constexpr c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_generic(size, allocator(), keys, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    IntArrayRef size,
    IntArrayRef stride,
    Optional<c10::ScalarType> dtype,
    Optional<c10::Layout>,
    Optional<c10::Device> device,
    Optional<bool>) {
  const c10::OptionalDeviceGuard guard(device);
  constexpr c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_strided_generic(size, stride, allocator(), keys, c10::dtype_or_default(dtype));
}

at::Tensor view(const at::Tensor& self, c10::SymIntArrayRef size) {
  return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size));
}

at::Tensor as_strided(
    const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride, Optional<c10::SymInt> offset) {
  return at::native::as_strided_tensorimpl(
      self,
      C10_AS_INTARRAYREF_SLOW(size),
      C10_AS_INTARRAYREF_SLOW(stride),
      offset ? Optional<int64_t>(offset->expect_int()) : std::nullopt);
}

at::Tensor reshape_alias(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return at::native::set_tensor_(self, source);
}

at::Tensor& set_storage(
    at::Tensor& self, c10::Storage source, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), offset.expect_int());
  return self;
}

const at::Tensor& resize(const at::Tensor& self, c10::SymIntArrayRef size, Optional<c10::MemoryFormat>) {
  const auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  const auto bytes = at::detail::computeStorageNbytesContiguous(sizes, self.itemsize(), self.storage_offset());
  auto* storage = self.storage().unsafeGetStorageImpl();
  if (bytes > storage->nbytes()) {
    const c10::OptionalDeviceGuard guard(self.device());
    auto memory = allocator()->allocate(bytes);
    allocator()->copy_data(memory.get(), storage->data(), storage->nbytes());
    storage->set_data_ptr(std::move(memory));
    storage->set_nbytes(bytes);
  }
  self.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return self;
}

// Every copy to, from and between devices.
at::Tensor copy_from(const at::Tensor& source, const at::Tensor& target, bool non_blocking) {
  for (const auto& tensor : {source, target})
    TORCH_CHECK(
        is_here(tensor) || tensor.device().type() == kCPU, "aten::copy_: ", tensor.device(), " is no device here");
  const bool from_here = is_here(source), to_here = is_here(target);
  Call reading("aten::copy_"), writing("aten::copy_");
  auto from = reading.to_cpu(source, false);
  auto to = writing.to_cpu(target, true);
  if (from_here && to_here) {
    if (source.device() != target.device()) { // after what both devices' streams have been given, and before the rest
      int a = begin(source.device().index()), b = begin(target.device().index());
      wait(a, b);
      wait(b, a);
      count_between(target.nbytes(), target.device().index());
    }
  }
  reading.begin();
  writing.begin();
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    to.copy_(from);
  }
  if (from_here && to_here && source.device() != target.device()) {
    int a = begin(source.device().index()), b = begin(target.device().index());
    wait(a, b);
    wait(b, a);
  } else if (from_here && !to_here) {
    count_to_host(target.nbytes(), source.device().index());
    if (!non_blocking || !is_pinned(target.const_data_ptr()))
      synchronize(begin(source.device().index()));
  } else if (to_here && !from_here) {
    count_to_device(target.nbytes(), target.device().index());
    if (!non_blocking)
      synchronize(begin(target.device().index()));
  }
  return target;
}

at::Tensor copy_from_and_resize(const at::Tensor& source, const at::Tensor& target) {
  target.resize_(source.sizes());
  return copy_from(source, target, false);
}

at::Scalar item(const at::Tensor& self) {
  auto there = at::detail::empty_cpu({}, self.scalar_type());
  copy_from(self, at::Tensor(there), false);
  return at::Tensor(there).item();
}

// PyTorch's attention in its own operators: 0 is SDPBackend.MATH.
int64_t attention_choice(
    const at::Tensor&,
    const at::Tensor&,
    const at::Tensor&,
    const Optional<at::Tensor>&,
    double,
    bool,
    Optional<double>,
    bool) {
  return 0;
}

void record_stream(at::Tensor& self, c10::Stream stream) {
  const c10::impl::VirtualGuardImpl guard(kType);
  guard.recordDataPtrOnStream(self.storage().data_ptr(), stream);
}

// ``size`` bytes at an address that `simulated_reserve` gave, as a tensor of uint8.
at::Tensor at_address(int64_t address, int64_t size, c10::Device) {
  auto memory = view_of(static_cast<uintptr_t>(address), static_cast<size_t>(size));
  c10::Storage storage(c10::Storage::use_byte_size_t(), size, std::move(memory), allocator(), /*resizable=*/false);
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), caffe2::TypeMeta::Make<uint8_t>());
  tensor.unsafeGetTensorImpl()->set_sizes_contiguous({size});
  return tensor;
}

TORCH_LIBRARY(simulated, library) {
  library.def("at_address(int address, int size, Device device) -> Tensor", at_address);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("view", view);
  library.impl("as_strided", as_strided);
  library.impl("_reshape_alias", reshape_alias);
  library.impl("unfold", at::native::unfold);
  library.impl("set_.source_Tensor", set_tensor);
  library.impl("set_.source_Storage_storage_offset", set_storage);
  library.impl("resize_", resize);
  library.impl("_copy_from", copy_from);
  library.impl("_copy_from_and_resize", copy_from_and_resize);
  library.impl("_local_scalar_dense", item);
  library.impl("_fused_sdp_choice", attention_choice);
  library.impl("record_stream", record_stream);
}

} // namespace
} // namespace simulated
