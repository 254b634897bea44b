// What needs no GPU: windows of clips of every length, reading of manifests and latents.
//
//   clip-test                      checks the windows
//   clip-test ENGINES LATENTS      says what it has read, for a comparison with the Python side

#include "clip.h"

#include <cstdio>
#include <iostream>

using namespace magihuman;

namespace {

void expect(bool holds, const std::string& what) {
  if (!holds) throw std::runtime_error("failed: " + what);
}

// Every frame of a clip comes from its own latent, once: a decoder that stamps each frame with the
// latent it came from, four frames each and one for a clip's first.
void windows_of_every_length() {
  Manifest manifest;
  manifest.mean = {0.5f};
  manifest.std = {2.0f};
  for (long long total = 1; total < 60; ++total) {
    Latents latents;
    latents.channels = latents.rows = latents.columns = 1;
    latents.frames = total;
    for (long long t = 0; t < total; ++t)
      latents.values.push_back(static_cast<float>(t) / 510 - 0.5f);
    std::vector<uint8_t> found;
    long long remaining = 4 * (total - 1) + 1;
    for (const Window& window : plan_windows(total, 7, 7)) {
      const std::vector<float> given = latents.window(window, manifest);
      expect(static_cast<long long>(given.size()) == window.latents(), "the latents of a window");
      std::vector<float> stamped;
      for (int channel = 0; channel < 3; ++channel)
        for (size_t i = 0; i < given.size(); ++i)
          stamped.insert(stamped.end(), window.is_first() && i == 0 ? 1 : 4,
                         2 * (given[i] + 0.5f) - 1 + 1e-3f);
      const auto rgb = frames(stamped, 1, 4 * window.left, 4 * window.right, remaining);
      for (size_t i = 0; i < rgb.size(); i += 3) {
        expect(rgb[i] == rgb[i + 1] && rgb[i] == rgb[i + 2], "the same in all channels");
        found.push_back(rgb[i]);
      }
      remaining -= static_cast<long long>(rgb.size()) / 3;
    }
    expect(remaining == 0, "as many frames as the clip has");
    for (size_t frame = 0; frame < found.size(); ++frame)
      expect(found[frame] == (frame + 3) / 4,
             "frame " + std::to_string(frame) + " of " + std::to_string(total));
  }
}

}  // namespace

int main(int count, char** arguments) {
  try {
    if (count == 1) windows_of_every_length();
    if (count == 3) {
      const Manifest manifest = Manifest::read(arguments[1]);
      std::cout << manifest.dtype << " " << manifest.flavour << " " << manifest.version << " "
                << manifest.sm << "\n";
      for (const Graph& graph : manifest.graphs)
        std::cout << graph.engine << " " << graph.latents[0] << " " << graph.height[1] << " "
                  << graph.width[2] << "\n";
      const Latents latents = Latents::read(arguments[2]);
      std::cout << latents.channels << " " << latents.frames << " " << latents.rows << " "
                << latents.columns;
      std::printf(" %.6f\n", static_cast<double>(latents.values.back()));
    }
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 1;
  }
}
