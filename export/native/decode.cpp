// magihuman-decode: latents to raw frames on TensorRT engines, without Python or torch.
//
//   magihuman-decode ENGINES LATENTS.safetensors FRAMES.rgb
//
// ENGINES is a folder of `magihuman export --vae --target tensorrt`. LATENTS holds one F32 tensor,
// [1, 48, T, H, W], normalised. FRAMES gets 4 (T - 1) + 1 frames of 16 H rows of 16 W pixels of
// three bytes, for instance for `ffmpeg -f rawvideo -pix_fmt rgb24 -video_size 480x256 -r 25 -i`.

#include <NvInferRuntime.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstdio>
#include <iostream>
#include <map>
#include <memory>

#include "clip.h"

namespace {

using magihuman::Graph;
using magihuman::Latents;
using magihuman::Manifest;
using magihuman::Window;

#ifdef TRT_MAJOR_RTX
const char* const kFlavour = "tensorrt_rtx";
#else
const char* const kFlavour = "tensorrt";
#endif

class Logger : public nvinfer1::ILogger {
  void log(Severity severity, const char* message) noexcept override {
    if (severity <= Severity::kWARNING) std::cerr << kFlavour << ": " << message << "\n";
  }
};

void check(cudaError_t status) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
}

void check(bool done, const std::string& what) {
  if (!done) throw std::runtime_error("TensorRT could not " + what);
}

std::string own_version() {
  return std::to_string(getInferLibMajorVersion()) + "." +
         std::to_string(getInferLibMinorVersion()) + "." +
         std::to_string(getInferLibPatchVersion()) + "." +
         std::to_string(getInferLibBuildVersion());
}

long long own_sm() {
  int device = 0, major = 0, minor = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  return 10 * major + minor;
}

struct Free {
  void operator()(void* memory) const { cudaFree(memory); }
};
using Memory = std::unique_ptr<void, Free>;

Memory allocate(size_t bytes) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, bytes));
  return Memory(memory);
}

template <typename T>
std::vector<char> encoded(const std::vector<float>& values) {
  std::vector<char> out(values.size() * sizeof(T));
  T* to = reinterpret_cast<T*>(out.data());
  for (size_t i = 0; i < values.size(); ++i) to[i] = T(values[i]);
  return out;
}

template <typename T>
std::vector<float> decoded(const std::vector<char>& bytes) {
  const T* from = reinterpret_cast<const T*>(bytes.data());
  std::vector<float> out(bytes.size() / sizeof(T));
  for (size_t i = 0; i < out.size(); ++i) out[i] = static_cast<float>(from[i]);
  return out;
}

size_t count(const nvinfer1::Dims& dims) {
  size_t out = 1;
  for (int i = 0; i < dims.nbDims; ++i) {
    check(dims.d[i] > 0, "tell the shape of its output");
    out *= static_cast<size_t>(dims.d[i]);
  }
  return out;
}

class Decoder {
 public:
  explicit Decoder(Manifest manifest)
      : manifest_(std::move(manifest)), runtime_(nvinfer1::createInferRuntime(logger_)) {
    check(runtime_ != nullptr, "start");
    check(cudaStreamCreate(&stream_));
  }
  ~Decoder() { cudaStreamDestroy(stream_); }
  Decoder(const Decoder&) = delete;
  Decoder& operator=(const Decoder&) = delete;

  // [3, frames, 16 H, 16 W] of one window.
  std::vector<float> window(const Latents& latents, const Window& window) {
    const long long t = window.latents();
    const Graph& graph = manifest_.graph(window.is_first(), t, latents.rows, latents.columns);
    nvinfer1::IExecutionContext& context = loaded(graph.engine);
    nvinfer1::Dims shape{};
    shape.nbDims = 5;
    const long long sizes[] = {1, latents.channels, t, latents.rows, latents.columns};
    for (int i = 0; i < 5; ++i)
      shape.d[i] = static_cast<std::remove_reference_t<decltype(shape.d[i])>>(sizes[i]);
    check(context.setInputShape("latents", shape), "take latents of this shape");

    const std::vector<char> given = in_dtype(latents.window(window, manifest_));
    std::vector<char> got(count(context.getTensorShape("decoded")) * item_bytes());
    Memory input = allocate(given.size()), output = allocate(got.size());
    check(
        cudaMemcpyAsync(input.get(), given.data(), given.size(), cudaMemcpyHostToDevice, stream_));
    check(context.setTensorAddress("latents", input.get()), "bind its input");
    check(context.setTensorAddress("decoded", output.get()), "bind its output");
    check(context.enqueueV3(stream_), "run " + graph.engine);
    check(cudaMemcpyAsync(got.data(), output.get(), got.size(), cudaMemcpyDeviceToHost, stream_));
    check(cudaStreamSynchronize(stream_));
    return from_dtype(got);
  }

 private:
  struct Loaded {  // the context goes first
    std::unique_ptr<nvinfer1::ICudaEngine> engine;
    std::unique_ptr<nvinfer1::IExecutionContext> context;
  };

  nvinfer1::IExecutionContext& loaded(const std::string& name) {
    Loaded& entry = loaded_[name];
    if (!entry.context) {
      const std::string plan = magihuman::read_text(manifest_.folder / name);
      entry.engine.reset(runtime_->deserializeCudaEngine(plan.data(), plan.size()));
      check(entry.engine != nullptr, "load " + name);
      entry.context.reset(entry.engine->createExecutionContext());
      check(entry.context != nullptr, "make room for " + name);
    }
    return *entry.context;
  }

  size_t item_bytes() const { return manifest_.dtype == "fp32" ? 4 : 2; }
  std::vector<char> in_dtype(const std::vector<float>& values) const {
    if (manifest_.dtype == "bf16") return encoded<__nv_bfloat16>(values);
    return manifest_.dtype == "fp16" ? encoded<__half>(values) : encoded<float>(values);
  }
  std::vector<float> from_dtype(const std::vector<char>& bytes) const {
    if (manifest_.dtype == "bf16") return decoded<__nv_bfloat16>(bytes);
    return manifest_.dtype == "fp16" ? decoded<__half>(bytes) : decoded<float>(bytes);
  }

  Manifest manifest_;
  Logger logger_;
  std::unique_ptr<nvinfer1::IRuntime> runtime_;
  std::map<std::string, Loaded> loaded_;
  cudaStream_t stream_ = nullptr;
};

void decode(const char* engines, const char* latents_path,
            const std::filesystem::path& frames_path) {
  const Manifest manifest = Manifest::read(engines);
  const Latents latents = Latents::read(latents_path);
  manifest.check(kFlavour, own_version(), own_sm());
  if (latents.channels != static_cast<long long>(manifest.mean.size()))
    throw std::runtime_error("latents must have " + std::to_string(manifest.mean.size()) +
                             " channels, got " + std::to_string(latents.channels));
  const auto windows = magihuman::plan_windows(latents.frames, manifest.first, manifest.step);
  for (const Window& window : windows)  // all sizes are refused before anything is decoded
    manifest.graph(window.is_first(), window.latents(), latents.rows, latents.columns);

  std::filesystem::path temporary = frames_path;
  temporary += ".part";
  try {
    std::ofstream file(temporary, std::ios::binary);
    Decoder decoder(manifest);
    const long long plane = latents.rows * latents.columns * manifest.stride * manifest.stride;
    long long remaining = manifest.ratio * (latents.frames - 1) + 1;
    for (const Window& window : windows) {
      const std::vector<float> values = decoder.window(latents, window);
      const auto rgb = magihuman::frames(values, plane, manifest.ratio * window.left,
                                         manifest.ratio * window.right, remaining);
      file.write(reinterpret_cast<const char*>(rgb.data()),
                 static_cast<std::streamsize>(rgb.size()));
      remaining -= static_cast<long long>(rgb.size()) / (3 * plane);
    }
    file.close();
    if (!file) throw std::runtime_error(frames_path.string() + " cannot be written");
    std::filesystem::rename(temporary, frames_path);
  } catch (...) {
    std::error_code ignored;
    std::filesystem::remove(temporary, ignored);
    throw;
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 4) {
    std::cerr << "usage: magihuman-decode ENGINES LATENTS.safetensors FRAMES.rgb\n";
    return 2;
  }
  try {
    decode(arguments[1], arguments[2], arguments[3]);
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 1;
  }
}
