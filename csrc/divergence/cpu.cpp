#include "divergence/divergence.h"

namespace xopd {
namespace {

enum class Kind {
  TEACHER_STUDENT,  // beta 0: KL(teacher || student)
  STUDENT_TEACHER,  // beta 1: KL(student || teacher)
  MIXTURE,          // between: beta KL(teacher || m) + (1 - beta) KL(student || m)
};

// Terms >= 0 whose sum over the classes is KL(a || b): a (e^r - 1 - r), r = log(b / a).
inline Floats kl_terms(Floats r, Floats a, Floats b) {
  const Floats one = splat(1.0f);
  // (e^r - 1 - r) / r^2 as a polynomial, fitted over |r| <= 1: the difference would cancel.
  const Floats x = at_least(-at_least(-r, -one), -one);
  Floats s = splat(2.8062802582e-6f);
  s = s * x + splat(2.5358512245e-5f);
  s = s * x + splat(1.9838101969e-4f);
  s = s * x + splat(1.3885396912e-3f);
  s = s * x + splat(8.3333396759e-3f);
  s = s * x + splat(4.1666736595e-2f);
  s = s * x + splat(1.6666666647e-1f);
  s = s * x + splat(0.5f);
  const Floats near = s * x * x * a, far = (b - a) - a * r;
  const Floats terms = absolute(r) < one ? near : far;
  return a == Floats{} ? b : terms;
}

// What a class adds to the divergence, and its derivative by log p.
struct Term {
  Floats value;
  Floats slope;
};

// The terms of a pair of log-probabilities, p of the student and q of the teacher.
template <Kind KIND>
struct Divergence {
  Floats beta;
  Floats rest;  // 1 - beta

  static Divergence of(double beta) {
    return {splat(static_cast<float>(beta)), splat(static_cast<float>(1.0 - beta))};
  }

  Term term(Floats log_p, Floats log_q) const {
    const Floats p = exp(log_p), q = exp(log_q);
    // Both are -inf where neither has mass.
    const Floats ratio = log_p == log_q ? Floats{} : log_q - log_p;
    if constexpr (KIND == Kind::TEACHER_STUDENT) return {kl_terms(-ratio, q, p), -q};
    if constexpr (KIND == Kind::STUDENT_TEACHER) {
      return {kl_terms(ratio, p, q), p == Floats{} ? Floats{} : -ratio * p};
    }
    // m is the larger of p and q times 1 - share (1 - smaller / larger): a difference of log m
    // and log p would lose the digits of small ratios.
    const auto p_is_larger = ratio <= Floats{};
    const Floats share = p_is_larger ? beta : rest;
    const Floats over_larger = log1p(expm1(-absolute(ratio)) * share);
    const Floats over_p = p_is_larger ? over_larger : over_larger + ratio;
    const Floats over_q = p_is_larger ? over_larger - ratio : over_larger;
    const Floats m = p * rest + q * beta;
    const Floats value = beta * kl_terms(over_q, q, m) + rest * kl_terms(over_p, p, m);
    return {value, p == Floats{} ? Floats{} : over_p * p * -rest};
  }
};

// log p of one row, piece by piece.
struct RowLogprob {
  Floats maximum;
  Floats log_total;

  static RowLogprob of(const xopd_side& side, int64_t row) {
    return {splat(side.maximum[row]), splat(side.log_total[row])};
  }

  Floats at(const Buffer& z, int64_t i) const { return (load(z.values + i) - maximum) - log_total; }
};

template <Kind KIND>
void add_row(const xopd_divergence& call, int64_t row) {
  Buffer student, teacher;
  const auto divergence = Divergence<KIND>::of(call.beta);
  const RowLogprob p = RowLogprob::of(call.student, row), q = RowLogprob::of(call.teacher, row);
  for (int64_t begin = 0; begin < call.classes; begin += PIECE) {
    const int64_t count = std::min(PIECE, call.classes - begin);
    transform(call.student.logits, row, begin, count, student, nullptr);
    transform(call.teacher.logits, row, begin, count, teacher, nullptr);
    Sum values, slopes;
    for (int64_t i = 0; i < padded(count); i += STEP) {
      for (int64_t k = 0; k < UNROLL; ++k) {
        const int64_t at = i + k * WIDTH;
        const Term term = divergence.term(p.at(student, at), q.at(teacher, at));
        values.lanes[k] += term.value;
        slopes.lanes[k] += term.slope;
      }
    }
    call.value[row] += values.total();
    call.slope_sum[row] += slopes.total();
  }
}

template <Kind KIND>
void write_row(const xopd_divergence_gradient& call, int64_t row) {
  Buffer student, teacher, slopes;
  const xopd_logits& logits = call.student.logits;
  Buffer* slope = logits.cap == 0.0f ? nullptr : &slopes;
  const auto divergence = Divergence<KIND>::of(call.beta);
  const RowLogprob p = RowLogprob::of(call.student, row), q = RowLogprob::of(call.teacher, row);
  const Floats slope_sum = splat(call.slope_sum[row]), weight = splat(call.weight[row]);
  const Floats scaled_weight = weight * logits.scale;
  for (int64_t begin = 0; begin < call.classes; begin += PIECE) {
    const int64_t count = std::min(PIECE, call.classes - begin);
    transform(logits, row, begin, count, student, slope);
    transform(call.teacher.logits, row, begin, count, teacher, nullptr);
    float* out = call.out + row * call.out_row_stride + begin;
    const auto value = [&](int64_t at) {
      const Floats log_p = p.at(student, at);
      const Term term = divergence.term(log_p, q.at(teacher, at));
      const Floats factor = slope == nullptr ? scaled_weight : weight * load(slope->values + at);
      return factor * (term.slope - exp(log_p) * slope_sum);
    };
    int64_t i = 0;
    for (; i + WIDTH <= count; i += WIDTH) store(out + i, value(i));
    if (i < count) store_part(out + i, value(i), count - i);
  }
}

// visit(kind) with the kind as a type, for the loops that are compiled for one of them.
template <Kind KIND>
struct KindOf {
  static constexpr Kind VALUE = KIND;
};

template <class Visit>
int32_t with_kind(double beta, const Visit& visit) {
  if (beta == 0.0) return visit(KindOf<Kind::TEACHER_STUDENT>{});
  if (beta == 1.0) return visit(KindOf<Kind::STUDENT_TEACHER>{});
  return visit(KindOf<Kind::MIXTURE>{});
}

}  // namespace
}  // namespace xopd

extern "C" {

int32_t xopd_add_divergence(const xopd_divergence* call, xopd_parallel_for* parallel) {
  return xopd::with_kind(call->beta, [=](auto kind) {
    return xopd::for_rows(parallel, call->rows, call->classes, [call](int64_t row) {
      xopd::add_row<decltype(kind)::VALUE>(*call, row);
    });
  });
}

int32_t xopd_write_divergence_gradient(const xopd_divergence_gradient* call,
                                       xopd_parallel_for* parallel) {
  return xopd::with_kind(call->beta, [=](auto kind) {
    return xopd::for_rows(parallel, call->rows, call->classes, [call](int64_t row) {
      xopd::write_row<decltype(kind)::VALUE>(*call, row);
    });
  });
}
}
