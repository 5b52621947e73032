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

// A row's log-probs of one model: log p = (z - maximum) - log_total.
struct RowLogprob {
  Floats maximum;
  Floats log_total;

  static RowLogprob of(const xopd_side& side, int64_t row) {
    return {splat(side.maximum[row]), splat(side.log_total[row])};
  }

  Floats at(const Buffer& z, int64_t i) const { return (load(z.values + i) - maximum) - log_total; }
};

// Both models' log-probs of a piece of a row, p of the student and q of the teacher, and what is
// made of them step by step: each step is a loop of its own, because in one loop the chain from an
// exponential to a logarithm to a polynomial would leave the processor too few independent classes.
struct Pair {
  Buffer student;  // z, later p
  Buffer teacher;  // z, later q
  Buffer ratio;    // log(q / p)
  Buffer over;     // log(m / the larger of p and q), m the mixture

  // p, q and the ratio; without `has_value` only what the slope needs.
  void to_probabilities(const RowLogprob& p, const RowLogprob& q, int64_t count, bool has_value) {
    for (int64_t i = 0; i < padded(count); i += WIDTH) {
      const Floats log_p = p.at(student, i), log_q = q.at(teacher, i);
      // Both are -inf where neither has mass.
      store(ratio.values + i, log_p == log_q ? Floats{} : log_q - log_p);
      store(student.values + i, exp(log_p));
      if (has_value) store(teacher.values + i, exp(log_q));
    }
  }

  // m is the larger of p and q times 1 - share (1 - smaller / larger): a difference of log m and
  // log p would lose the digits of small ratios.
  void to_mixture(Floats beta, Floats rest, int64_t count) {
    for (int64_t i = 0; i < padded(count); i += WIDTH) {
      const Floats r = load(ratio.values + i);
      store(over.values + i, expm1(-absolute(r)) * (r <= Floats{} ? beta : rest));
    }
    for (int64_t i = 0; i < padded(count); i += WIDTH) {
      store(over.values + i, log1p(load(over.values + i)));
    }
  }
};

template <Kind KIND>
struct Divergence {
  Floats beta;
  Floats rest;  // 1 - beta

  static Divergence of(double beta) {
    return {splat(static_cast<float>(beta)), splat(static_cast<float>(1.0 - beta))};
  }

  // From logits to what `term` (or, without `has_value`, `slope`) reads.
  void prepare(Pair& pair, const RowLogprob& p, const RowLogprob& q, int64_t count,
               bool has_value) const {
    // KL(teacher || student): its slope is -q.
    pair.to_probabilities(p, q, count, has_value || KIND == Kind::TEACHER_STUDENT);
    if constexpr (KIND == Kind::MIXTURE) pair.to_mixture(beta, rest, count);
  }

  Term term(const Pair& pair, int64_t i) const {
    const Floats p = load(pair.student.values + i), q = load(pair.teacher.values + i);
    const Floats ratio = load(pair.ratio.values + i);
    if constexpr (KIND == Kind::TEACHER_STUDENT) return {kl_terms(-ratio, q, p), -q};
    if constexpr (KIND == Kind::STUDENT_TEACHER) return {kl_terms(ratio, p, q), slope(pair, i)};
    const Floats over_larger = load(pair.over.values + i);
    const auto p_is_larger = ratio <= Floats{};
    const Floats over_p = p_is_larger ? over_larger : over_larger + ratio;
    const Floats over_q = p_is_larger ? over_larger - ratio : over_larger;
    const Floats m = p * rest + q * beta;
    const Floats value = beta * kl_terms(over_q, q, m) + rest * kl_terms(over_p, p, m);
    return {value, p == Floats{} ? Floats{} : over_p * p * -rest};
  }

  Floats slope(const Pair& pair, int64_t i) const {
    if constexpr (KIND == Kind::TEACHER_STUDENT) return -load(pair.teacher.values + i);
    const Floats p = load(pair.student.values + i), ratio = load(pair.ratio.values + i);
    if constexpr (KIND == Kind::STUDENT_TEACHER) return p == Floats{} ? Floats{} : -ratio * p;
    const Floats over_larger = load(pair.over.values + i);
    const Floats over_p = ratio <= Floats{} ? over_larger : over_larger + ratio;
    return p == Floats{} ? Floats{} : over_p * p * -rest;
  }
};

template <Kind KIND>
void add_row(const xopd_divergence& call, int64_t row) {
  Pair pair;
  const Floats bound = splat(call.bound[row]);
  const auto divergence = Divergence<KIND>::of(call.beta);
  const RowLogprob p = RowLogprob::of(call.student, row), q = RowLogprob::of(call.teacher, row);
  for (int64_t begin = 0; begin < call.classes; begin += PIECE) {
    const int64_t count = std::min(PIECE, call.classes - begin);
    transform(call.student.logits, row, begin, count, pair.student, nullptr);
    transform(call.teacher.logits, row, begin, count, pair.teacher, nullptr);
    divergence.prepare(pair, p, q, count, true);
    Sum values, tops, others;
    for (int64_t i = 0; i < padded(count); i += STEP) {
      for (int64_t k = 0; k < UNROLL; ++k) {
        const int64_t at = i + k * WIDTH;
        const Term term = divergence.term(pair, at);
        const auto is_top = load(pair.student.values + at) > bound;
        values.lanes[k] += term.value;
        tops.lanes[k] += is_top ? term.slope : Floats{};
        others.lanes[k] += is_top ? Floats{} : term.slope;
      }
    }
    call.value[row] += values.total();
    call.slope_top[row] += tops.total();
    call.slope_others[row] += others.total();
  }
}

// The classes [begin, begin + count) of a row, at most a piece.
template <Kind KIND>
void write_classes(const xopd_divergence_gradient& call, int64_t row, int64_t begin, int64_t count,
                   float* out) {
  Pair pair;
  Buffer slopes;
  const xopd_logits& logits = call.student.logits;
  Buffer* slope = logits.cap == 0.0f ? nullptr : &slopes;
  const auto divergence = Divergence<KIND>::of(call.beta);
  const RowLogprob p = RowLogprob::of(call.student, row), q = RowLogprob::of(call.teacher, row);
  const Floats slope_sum = splat(call.slope_sum[row]), weight = splat(call.weight[row]);
  const Floats slope_others = splat(call.slope_others[row]), rest = splat(call.rest[row]);
  const Floats bound = splat(call.bound[row]);
  const Floats scaled_weight = weight * logits.scale;
  transform(logits, row, begin, count, pair.student, slope);
  transform(call.teacher.logits, row, begin, count, pair.teacher, nullptr);
  divergence.prepare(pair, p, q, count, false);
  const auto value = [&](int64_t at) {
    const Floats factor = slope == nullptr ? scaled_weight : weight * load(slope->values + at);
    const Floats u = divergence.slope(pair, at), prob = load(pair.student.values + at);
    const Floats of_top = u * rest - prob * slope_others, other = u - prob * slope_sum;
    return factor * (prob > bound ? of_top : other);
  };
  int64_t i = 0;
  for (; i + WIDTH <= count; i += WIDTH) store(out + i, value(i));
  if (i < count) store_part(out + i, value(i), count - i);
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
    return xopd::write_d_logit(call->d_logit, call->rows, call->classes, parallel,
                               [=](int64_t row, int64_t begin, int64_t count, float* out) {
                                 xopd::write_classes<decltype(kind)::VALUE>(*call, row, begin,
                                                                            count, out);
                               });
  });
}
}
