// The table of kernels for one instruction set: compiled once for each, with PDMD_CAPABILITY and the compiler's flags.
#include "kernels.h"

#include "adamw.h"
#include "gelu.h"
#include "latents.h"
#include "modulation.h"
#include "philox.h"
#include "rms_rope.h"

#define PDMD_JOINED(a, b) a##b
#define PDMD_TABLE(capability) PDMD_JOINED(capability, _kernels)
#define PDMD_QUOTED(x) #x
#define PDMD_NAME(capability) PDMD_QUOTED(capability)

namespace pdmd {

const Kernels* PDMD_TABLE(PDMD_CAPABILITY)() {
  namespace k = PDMD_CAPABILITY;
  using k::bf16;
  static constexpr Kernels kTable = {
      PDMD_NAME(PDMD_CAPABILITY),
      k::random_words,
      k::normal,
      k::linear,
      k::loss,
      k::gradient_scale,
      k::gradient,
      {k::layer_norm<float>, k::layer_norm<bf16>},
      {k::layer_norm_backward<float>, k::layer_norm_backward<bf16>},
      {k::gated<float>, k::gated<bf16>},
      {k::gated_backward<float>, k::gated_backward<bf16>},
      {k::sum_of_squares<float>, k::sum_of_squares<bf16>},
      {k::rms_rope<float>, k::rms_rope<bf16>},
      {k::rms_norm_rope<float>, k::rms_norm_rope<bf16>},
      {k::rms_rope_backward_dots<float>, k::rms_rope_backward_dots<bf16>},
      {k::rms_rope_backward_dx<float>, k::rms_rope_backward_dx<bf16>},
      {k::rms_norm_rope_backward<float>, k::rms_norm_rope_backward<bf16>},
      {k::gelu<float>, k::gelu<bf16>},
      {k::gelu_backward<float>, k::gelu_backward<bf16>},
      k::sum_rows,
      k::adamw,
  };
  return &kTable;
}

}  // namespace pdmd
