// The block's ops as autograd sees them: each calls its primitive through the dispatcher, forward and backward. From
// Python such a function costs several times what the kernels themselves take on small tensors.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace pdmd {
namespace {

using at::Tensor;
using OptionalTensor = const std::optional<Tensor>&;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Mask = std::array<bool, 2>;

template <typename Signature>
c10::TypedOperatorHandle<Signature> primitive(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

Tensor rows_contiguous(const Tensor& m) {
  return m.dim() > 0 && m.stride(-1) == 1 ? m : m.contiguous();
}

void refuse_second_derivative() {
  TORCH_CHECK_NOT_IMPLEMENTED(!at::GradMode::is_enabled(),
                              "the pdmd ops have no second derivative; call backward without create_graph");
}

Tensor if_needed(bool needed, const Tensor& grad) { return needed ? grad : Tensor(); }

struct LayerNorm : torch::autograd::Function<LayerNorm> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& shift, const Tensor& scale, double eps) {
    static const auto op = primitive<std::tuple<Tensor, Tensor, Tensor>(
        const Tensor&, const Tensor&, const Tensor&, double)>("pdmd::modulated_layer_norm");
    TORCH_CHECK_VALUE(shift.sizes() == scale.sizes(), "shift is ", shift.sizes(), " and scale ", scale.sizes());
    at::AutoDispatchBelowAutograd below;
    const Tensor rows = x.contiguous(), scales = rows_contiguous(scale);
    auto [y, mean, rstd] = op.call(rows, rows_contiguous(shift), scales, eps);
    ctx->save_for_backward({rows, scales, mean, rstd});
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = primitive<std::tuple<Tensor, Tensor, Tensor>(
        const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, Mask)>(
        "pdmd::modulated_layer_norm_backward");
    refuse_second_derivative();
    const bool need_x = ctx->needs_input_grad(0), need_shift = ctx->needs_input_grad(1);
    const bool need_scale = ctx->needs_input_grad(2);
    const variable_list saved = ctx->get_saved_variables();
    auto [dx, dshift, dscale] =
        op.call(grads[0].contiguous(), saved[0], saved[1], saved[2], saved[3], {need_x, need_shift || need_scale});
    return {if_needed(need_x, dx), if_needed(need_shift, dshift), if_needed(need_scale, dscale), Tensor()};
  }
};

struct GatedResidual : torch::autograd::Function<GatedResidual> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& h, const Tensor& gate) {
    static const auto op = primitive<Tensor(const Tensor&, const Tensor&, const Tensor&)>("pdmd::gated_residual");
    at::AutoDispatchBelowAutograd below;
    const Tensor branch = h.contiguous(), gates = rows_contiguous(gate);
    ctx->save_for_backward({branch, gates});
    return op.call(x.contiguous(), branch, gates);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = primitive<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, Mask)>(
        "pdmd::gated_residual_backward");
    refuse_second_derivative();
    const bool need_h = ctx->needs_input_grad(1), need_gate = ctx->needs_input_grad(2);
    Tensor dh, dgate;
    if (need_h || need_gate) {
      const variable_list saved = ctx->get_saved_variables();
      std::tie(dh, dgate) = op.call(grads[0].contiguous(), saved[0], saved[1], {need_h, need_gate});
    }
    return {if_needed(ctx->needs_input_grad(0), grads[0]), if_needed(need_h, dh), if_needed(need_gate, dgate)};
  }
};

struct QKNormRope : torch::autograd::Function<QKNormRope> {
  static variable_list forward(AutogradContext* ctx, const Tensor& query, const Tensor& key, const Tensor& query_weight,
                               const Tensor& key_weight, OptionalTensor rope, int64_t heads, double eps) {
    static const auto op = primitive<std::tuple<Tensor, Tensor>(
        const Tensor&, const Tensor&, OptionalTensor, int64_t, double)>("pdmd::rms_norm_rope");
    TORCH_CHECK_VALUE(query.dim() == 3 && key.dim() == 3 && key.size(0) == query.size(0), "key is ", key.sizes());
    TORCH_CHECK_VALUE(key.scalar_type() == query.scalar_type(), "key is ", key.scalar_type());
    at::AutoDispatchBelowAutograd below;
    const Tensor q = query.contiguous(), k = key.contiguous();
    const Tensor q_weight = query_weight.contiguous(), k_weight = key_weight.contiguous();
    const std::optional<Tensor> table = rope ? std::optional<Tensor>(rope->contiguous()) : std::nullopt;
    auto [q_out, q_rstd] = op.call(q, q_weight, table, heads, eps);
    auto [k_out, k_rstd] = op.call(k, k_weight, table, heads, eps);
    ctx->save_for_backward({q, q_weight, q_rstd, k, k_weight, k_rstd, table.value_or(Tensor())});
    ctx->saved_data["heads"] = heads;
    return {q_out, k_out};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = primitive<std::tuple<Tensor, Tensor>(
        const Tensor&, const Tensor&, const Tensor&, const Tensor&, OptionalTensor, int64_t)>(
        "pdmd::rms_norm_rope_backward");
    refuse_second_derivative();
    const variable_list saved = ctx->get_saved_variables();
    const int64_t heads = ctx->saved_data["heads"].toInt();
    const std::optional<Tensor> rope = saved[6].defined() ? std::optional<Tensor>(saved[6]) : std::nullopt;
    variable_list results(7);
    for (size_t side = 0; side < 2; ++side) {
      const Tensor &x = saved[3 * side], &weight = saved[3 * side + 1], &rstd = saved[3 * side + 2];
      const bool need_x = ctx->needs_input_grad(side), need_weight = ctx->needs_input_grad(side + 2);
      if (!need_x && !need_weight) continue;
      auto [dx, dweight] = op.call(grads[side].contiguous(), x, weight, rstd, rope, heads);
      results[side] = if_needed(need_x, dx);
      if (need_weight) results[side + 2] = dweight.to(weight.scalar_type());
    }
    return results;
  }
};

struct GeluTanh : torch::autograd::Function<GeluTanh> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x) {
    static const auto op = primitive<Tensor(const Tensor&)>("pdmd::gelu_tanh");
    at::AutoDispatchBelowAutograd below;
    const Tensor values = x.contiguous();
    ctx->save_for_backward({values});
    return op.call(values);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = primitive<Tensor(const Tensor&, const Tensor&)>("pdmd::gelu_tanh_backward");
    refuse_second_derivative();
    return {op.call(grads[0].contiguous(), ctx->get_saved_variables()[0])};
  }
};

Tensor layer_norm(const Tensor& x, const Tensor& shift, const Tensor& scale, double eps) {
  return LayerNorm::apply(x, shift, scale, eps);
}

Tensor gated_residual(const Tensor& x, const Tensor& h, const Tensor& gate) { return GatedResidual::apply(x, h, gate); }

std::tuple<Tensor, Tensor> qk_norm_rope(const Tensor& query, const Tensor& key, const Tensor& query_weight,
                                        const Tensor& key_weight, OptionalTensor rope, int64_t heads, double eps) {
  variable_list results = QKNormRope::apply(query, key, query_weight, key_weight, rope, heads, eps);
  return {results[0], results[1]};
}

Tensor gelu_tanh(const Tensor& x) { return GeluTanh::apply(x); }

}  // namespace
}  // namespace pdmd

TORCH_LIBRARY_FRAGMENT(pdmd, m) {
  m.def("differentiable_modulated_layer_norm(Tensor x, Tensor shift, Tensor scale, float eps) -> Tensor",
        &pdmd::layer_norm);
  m.def("differentiable_gated_residual(Tensor x, Tensor h, Tensor gate) -> Tensor", &pdmd::gated_residual);
  m.def("differentiable_qk_norm_rope(Tensor query, Tensor key, Tensor query_weight, Tensor key_weight, Tensor? rope,"
        " int heads, float eps) -> (Tensor, Tensor)", &pdmd::qk_norm_rope);
  m.def("differentiable_gelu_tanh(Tensor x) -> Tensor", &pdmd::gelu_tanh);
}
