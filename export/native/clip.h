// What a manifest says of engines, which windows a clip is decoded in, and its latents and frames.
// Nothing here needs TensorRT or CUDA.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "json.h"

namespace magihuman {

inline std::string read_text(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::stringstream text;
  if (!file || !(text << file.rdbuf())) throw std::runtime_error(path.string() + " cannot be read");
  return text.str();
}

struct Graph {
  std::string kind, engine;
  std::array<long long, 3> latents, height, width;  // fewest, best, most

  bool takes(long long t, long long h, long long w) const {
    return latents[0] == t && height[0] <= h && h <= height[2] && width[0] <= w && w <= width[2];
  }
  bool is_first() const { return kind == "single" || kind == "first"; }
};

struct Manifest {
  std::filesystem::path folder;
  std::string dtype, flavour, version;
  long long sm = 0, first = 0, step = 0, ratio = 0, stride = 0;
  std::vector<float> mean, std;
  std::vector<Graph> graphs;

  // Reads a folder; throws where it is of another format, or where a file is missing or cut short.
  static Manifest read(const std::filesystem::path& folder) {
    const auto path = folder / "manifest.json";
    try {
      return parsed(folder, JsonReader::read(read_text(path)));
    } catch (const std::exception& error) {
      throw std::runtime_error(path.string() + ": " + error.what() + "; export it again");
    }
  }

  // Throws unless the engines were made by this TensorRT, for this GPU.
  void check(const std::string& own_flavour, const std::string& own_version,
             long long own_sm) const {
    const auto differ = [this](const std::string& what, const std::string& here,
                               const std::string& made) {
      if (here != made)
        throw std::runtime_error(folder.string() +
                                 ": engines run only where they were made for; the " + what +
                                 " here is " + here + ", theirs " + made + "; export it again");
    };
    differ("flavour of TensorRT", own_flavour, flavour);
    differ("version of TensorRT", own_version, version);
    differ("GPU", "sm_" + std::to_string(own_sm), "sm_" + std::to_string(sm));
  }

  const Graph& graph(bool is_first, long long t, long long h, long long w) const {
    for (const Graph& graph : graphs)
      if (graph.is_first() == is_first && graph.takes(t, h, w)) return graph;
    throw std::runtime_error("no engine takes windows of " + std::to_string(t) + " latents of " +
                             std::to_string(w * stride) + "x" + std::to_string(h * stride) +
                             " pixels; export that size");
  }

 private:
  static Manifest parsed(const std::filesystem::path& folder, const Json& values) {
    const auto must = [&values](const std::string& name, const std::string& wanted) {
      const std::string& got = values.at(name).text();
      if (got != wanted)
        throw std::runtime_error(name + " must be '" + wanted + "', got '" + got + "'");
    };
    must("format", "magihuman exported decoder");
    if (values.at("format_version").whole() != 1)
      throw std::runtime_error("format_version must be 1");
    must("decoder", "turbo_vae");
    must("target", "tensorrt");

    Manifest out;
    out.folder = folder;
    out.dtype = values.at("dtype").text();
    if (out.dtype != "bf16" && out.dtype != "fp16" && out.dtype != "fp32")
      throw std::runtime_error("dtype must be bf16, fp16 or fp32, got '" + out.dtype + "'");
    const Json &builder = values.at("builder"), &sizes = values.at("architecture");
    out.flavour = builder.at("flavour").text();
    out.version = builder.at("version").text();
    out.sm = builder.at("sm").whole();
    out.first = sizes.at("first_chunk_size").whole();
    out.step = sizes.at("step_size").whole();
    out.ratio = sizes.at("temporal_compression_ratio").whole();
    out.stride = sizes.at("spatial_compression_ratio").whole();
    for (const Json& value : values.at("latent_mean").items())
      out.mean.push_back(static_cast<float>(value.number));
    for (const Json& value : values.at("latent_std").items())
      out.std.push_back(static_cast<float>(value.number));
    const auto channels = static_cast<size_t>(sizes.at("latent_channels").whole());
    if (out.mean.size() != channels || out.std.size() != channels)
      throw std::runtime_error("latent_mean and latent_std must have a value for each channel");
    for (const Json& value : values.at("graphs").items()) {
      Graph graph{value.at("kind").text(), value.at("engine").text(), {}, {}, {}};
      const Json& dims = value.at("dims");
      for (size_t i = 0; i < 3; ++i) {
        graph.latents[i] = dims.at("latents").items().at(i).whole();
        graph.height[i] = dims.at("height").items().at(i).whole();
        graph.width[i] = dims.at("width").items().at(i).whole();
      }
      const auto file = folder / graph.engine;
      const long long wanted = values.at("files").at(graph.engine).at("bytes").whole();
      if (std::filesystem::path(graph.engine).has_parent_path() ||
          !std::filesystem::is_regular_file(file))
        throw std::runtime_error(graph.engine + " must be a file of the same folder");
      const auto got = static_cast<long long>(std::filesystem::file_size(file));
      if (got != wanted)
        throw std::runtime_error(graph.engine + " must have " + std::to_string(wanted) +
                                 " bytes, got " + std::to_string(got));
      out.graphs.push_back(graph);
    }
    return out;
  }
};

// Latents start..stop of a clip, decoded with `left` and `right` latents of context.
struct Window {
  long long start, stop, left, right;

  long long latents() const { return left + stop - start + right; }
  bool is_first() const { return start == 0; }
};

// The windows of a clip, in order; the last may reach beyond the clip's end.
inline std::vector<Window> plan_windows(long long latents, long long first, long long step) {
  std::vector<long long> edges{0, first};
  while (edges.back() < latents) edges.push_back(edges.back() + step);
  std::vector<Window> windows;
  for (size_t i = 0; i + 1 < edges.size(); ++i)
    windows.push_back({edges[i], edges[i + 1], i > 0, i + 2 < edges.size()});
  return windows;
}

// [channels, T, H, W] of normalised latents in fp32.
struct Latents {
  long long channels = 0, frames = 0, rows = 0, columns = 0;
  std::vector<float> values;

  // The one tensor of a safetensors file: F32, [1, C, T, H, W].
  static Latents read(const std::filesystem::path& path) {
    try {
      return parsed(read_text(path));
    } catch (const std::exception& error) {
      throw std::runtime_error(path.string() + ": " + error.what());
    }
  }

  // The latents of a window, un-normalised; those beyond the end repeat the last.
  std::vector<float> window(const Window& window, const Manifest& manifest) const {
    const long long plane = rows * columns;
    std::vector<float> out(static_cast<size_t>(channels * window.latents() * plane));
    float* to = out.data();
    for (long long c = 0; c < channels; ++c) {
      const float mean = manifest.mean[static_cast<size_t>(c)],
                  std = manifest.std[static_cast<size_t>(c)];
      for (long long t = window.start - window.left; t < window.stop + window.right; ++t) {
        const float* from = values.data() + (c * frames + std::min(t, frames - 1)) * plane;
        for (long long i = 0; i < plane; ++i) *to++ = from[i] * std + mean;
      }
    }
    return out;
  }

 private:
  static Latents parsed(const std::string& content) {
    uint64_t length = 0;
    if (content.size() < sizeof length) throw std::runtime_error("it is too short for safetensors");
    std::memcpy(&length, content.data(), sizeof length);
    if (length > content.size() - sizeof length)
      throw std::runtime_error("its header is cut short");
    const Json header = JsonReader::read(content.substr(sizeof length, length));
    const Json* tensor = nullptr;
    for (const auto& [name, value] : header.object) {
      if (name == "__metadata__") continue;
      if (tensor != nullptr) throw std::runtime_error("it must hold one tensor, got several");
      tensor = &value;
    }
    if (tensor == nullptr) throw std::runtime_error("it must hold one tensor, got none");
    const auto& shape = tensor->at("shape").items();
    if (tensor->at("dtype").text() != "F32" || shape.size() != 5 || shape[0].whole() != 1)
      throw std::runtime_error("its tensor must be F32 of the shape [1, channels, T, H, W]");
    Latents out;
    long long* sizes[] = {&out.channels, &out.frames, &out.rows, &out.columns};
    size_t count = 1;
    for (size_t i = 0; i < 4; ++i) {
      *sizes[i] = shape[i + 1].whole();
      if (*sizes[i] < 1 || *sizes[i] > 100000)
        throw std::runtime_error("its sizes must be from 1 to 100000");
      count *= static_cast<size_t>(*sizes[i]);
      if (count > content.size()) throw std::runtime_error("its tensor is cut short");
    }
    const char* data = content.data() + sizeof length + length;
    if (static_cast<size_t>(content.data() + content.size() - data) != count * sizeof(float))
      throw std::runtime_error("its tensor is cut short");
    out.values.resize(count);
    std::memcpy(out.values.data(), data, count * sizeof(float));
    return out;
  }
};

// One value of a frame as a pixel: x / 2 + 1/2, clamped, times 255, truncated.
inline uint8_t pixel(float x) {
  const float scaled = x * 0.5f + 0.5f;
  return static_cast<uint8_t>(std::fmin(std::fmax(scaled, 0.0f), 1.0f) * 255.0f);
}

// RGB bytes of a window's frames, [3, frames, plane] in fp32, without those of context and beyond
// the `most` that the clip still has.
inline std::vector<uint8_t> frames(const std::vector<float>& values, long long plane,
                                   long long left, long long right, long long most) {
  const long long all = static_cast<long long>(values.size()) / (3 * plane);
  const long long stop = std::min(all - right, left + most);
  std::vector<uint8_t> out;
  out.reserve(static_cast<size_t>(3 * plane * std::max(stop - left, 0LL)));
  for (long long t = left; t < stop; ++t)
    for (long long i = 0; i < plane; ++i)
      for (long long c = 0; c < 3; ++c)
        out.push_back(pixel(values[static_cast<size_t>((c * all + t) * plane + i)]));
  return out;
}

}  // namespace magihuman
