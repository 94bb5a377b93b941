/* The program around one step. Names that begin with a dollar sign stand for what depends on the body. */
#include <math.h>
#include <stdint.h>

#define VECTOR $vector /* bytes */

#ifdef VECTOR_MATH /* the C library has these functions for whole vectors too */
#define MATH __attribute__((simd("notinbranch"), const))
#else
#define MATH __attribute__((const))
#endif
#define UNARY(name) MATH double name(double); MATH float name##f(float);
#define BINARY(name) MATH double name(double, double); MATH float name##f(float, float);
UNARY(exp) UNARY(exp2) UNARY(expm1) UNARY(log) UNARY(log1p) UNARY(log2) UNARY(log10)
UNARY(sin) UNARY(cos) UNARY(tan) UNARY(asin) UNARY(acos) UNARY(atan) UNARY(erf) UNARY(erfc)
UNARY(sinh) UNARY(cosh) UNARY(tanh) UNARY(asinh) UNARY(acosh) UNARY(atanh)
BINARY(pow) BINARY(atan2) BINARY(hypot)

#define VECTOR_OF(type) typedef type vector_##type \
    __attribute__((vector_size(VECTOR), aligned(sizeof(type)), may_alias));
VECTOR_OF(float) VECTOR_OF(double) VECTOR_OF(int32_t) VECTOR_OF(int64_t)

#ifdef __clang__
#define TILES __attribute__((noinline))
#define SHUFFLE(integer, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define TILES __attribute__((noinline, optimize("fp-contract=fast")))
#define SHUFFLE(integer, a, b, ...) __builtin_shuffle(a, b, (vector_##integer){__VA_ARGS__})
#endif

#define OF_MEMBER(type, name, at) type *restrict name = (type *)(place[at] + n * member[at]);
#define OF_STEP(type, name, at) type *restrict name = (type *)(place[at] + n * member[at] + t * time[at]);
#define CONST(type, name, at) OF_MEMBER(const type, name, at)
#define CARRY(type, name, at) OF_MEMBER(type, name, at)
#define X(type, name, at) OF_STEP(const type, name, at)
#define Y(type, name, at) OF_STEP(type, name, at)

$functions
struct carry { $carry char none; };
struct near { $near char none; };
struct scratch { $scratch struct carry carries[2]; };

const int64_t scratch_size = sizeof(struct scratch), step_rounds = $rounds;

/* Where the tensors of a step lie. */
$places

/* Runs steps t0 to t1 of members n0 to n1. Returns -1, or the step in which an index is out of range. */
int64_t run(int64_t n0, int64_t n1, int64_t t0, int64_t t1, char *const *place,
            const int64_t *member, const int64_t *time, char *memory, const volatile int *stop) {
    struct near local, *restrict v = &local;
    struct scratch *restrict w = (struct scratch *)memory;
    int bad = 0;
    for (int64_t n = n0; n < n1; n++) {
        if (*stop) return -1;
        $of_member
        struct carry *first = w->carries;
        $load
        for (int64_t t = t0; t < t1; t++) {
            /* The two carries change places in turn. */
            struct carry *restrict now = w->carries + ((t - t0) & 1), *restrict next = w->carries + !((t - t0) & 1);
            $of_step
            $step
            if (bad) return t;
        }
        const struct carry *last = w->carries + ((t1 - t0) & 1);
        $save
    }
    return -1;
}
