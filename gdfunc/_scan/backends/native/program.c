/* The program around one step. Names that begin with a dollar sign stand for what depends on the body. */
$functions_of_c
#define VECTOR $vector /* bytes */

/* Numbers of 16 bits are floats in registers. Each operation rounds its result, as in torch. */
typedef uint16_t bfloat16, float16;
static inline uint32_t bits_of(float x) { uint32_t bits; __builtin_memcpy(&bits, &x, 4); return bits; }
static inline float with_bits(uint32_t bits) { float x; __builtin_memcpy(&x, &bits, 4); return x; }
static inline float from_bfloat16(uint32_t x) { return with_bits(x << 16); }
static inline uint32_t to_bfloat16(float x) {
    uint32_t bits = bits_of(x);
    return x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
static inline float from_float16(uint32_t x) {
    uint32_t bits = (x & 0x7fff) << 13, sign = (x & 0x8000) << 16;
    float normal = with_bits(bits + (bits < 0x0f800000 ? 112u << 23 : 224u << 23)); /* infinities too */
    float small = with_bits(bits + (113u << 23)) - 0x1p-14f;
    return with_bits(sign | bits_of(bits < 1u << 23 ? small : normal));
}
static inline uint32_t to_float16(float x) {
    uint32_t sign = bits_of(x) >> 16 & 0x8000, bits = bits_of(x) & 0x7fffffff;
    uint32_t normal = (bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13;
    uint32_t small = bits_of(with_bits(bits) + 0.5f) - (126u << 23); /* the sum rounds to units of 2^-24 */
    uint32_t finite = bits < 113u << 23 ? small : normal;
    return sign | (bits > 0x7f800000 ? 0x7e00 : bits >= 0x477ff000 ? 0x7c00 : finite);
}
static inline float round_bfloat16(float x) { return from_bfloat16(to_bfloat16(x)); }
static inline float round_float16(float x) {
    uint32_t sign = bits_of(x) & 0x80000000, bits = bits_of(x) ^ sign;
    uint32_t small = bits_of(with_bits(bits) + 0.5f - 0.5f), normal = bits + 0xfff + (bits >> 13 & 1) & ~0x1fff;
    uint32_t large = bits > 0x7f800000 ? bits : 0x7f800000;
    return with_bits(sign | (bits < 113u << 23 ? small : bits < 0x477ff000 ? normal : large));
}

/* 64 random bits for a counter of 64 bits and a key of two words, in 20 rounds of Threefry-2x32. */
#define ROUND(rotation) x += y; y = (y << (rotation) | y >> (32 - (rotation))) ^ x;
#define ROUNDS(r0, r1, r2, r3, a, b, count) ROUND(r0) ROUND(r1) ROUND(r2) ROUND(r3) x += a; y += b + count;
static inline int64_t threefry(int64_t key0, int64_t key1, int64_t counter) {
    const uint32_t k0 = key0, k1 = key1, k2 = k0 ^ k1 ^ 0x1bd11bda;
    uint32_t x = (uint32_t)((uint64_t)counter >> 32) + k0, y = (uint32_t)counter + k1;
    ROUNDS(13, 15, 26, 6, k1, k2, 1)
    ROUNDS(17, 29, 16, 24, k2, k0, 2)
    ROUNDS(13, 15, 26, 6, k0, k1, 3)
    ROUNDS(17, 29, 16, 24, k1, k2, 4)
    ROUNDS(13, 15, 26, 6, k2, k0, 5)
    return (int64_t)((uint64_t)x << 32 | y);
}

/* The derivatives of lgamma as in torch, after psi of the Cephes library: reflection, recurrence, and an
   asymptotic series in 1 / x^2. As in torch, trigamma has nine digits. */
#define GAMMA(type, f) \
    static type digamma##f(type x) { \
        type sum = 0; \
        if (x < 0) { \
            sum = x == trunc##f(x) ? __builtin_nan("") : -M_PI / tan(M_PI * (double)(x - trunc##f(x))); \
            x = 1 - x; \
        } \
        for (; x < 10; x += 1) sum -= 1 / x; \
        const type z = 1 / (x * x); \
        const type even = 1 / (type)120 - z * (1 / (type)252 - z * (1 / (type)240 - z * (1 / (type)132 - \
            z * (691 / (type)32760 - z / 12)))); \
        return sum + log##f(x) - 1 / (2 * x) - z * (1 / (type)12 - z * even); \
    } \
    static type trigamma##f(type x) { \
        type sum = 0, sign = 1; \
        if (x < (type)0.5) { \
            const type sine = sin##f((type)M_PI * x); \
            sum = -((type)M_PI * (type)M_PI) / (sine * sine), sign = -1, x = 1 - x; \
        } \
        for (int i = 0; i < 6; i++, x += 1) sum += 1 / (x * x); \
        const type z = 1 / (x * x), even = 1 / (type)6 - z * (1 / (type)30 - z * (1 / (type)42)); \
        return sign * (sum + (1 + 1 / (2 * x) + z * even) / x); \
    }
GAMMA(double, ) GAMMA(float, f)

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
#define FIXED 4 /* memories that are not the caller's */
struct carry { $carry char none; };
struct near { $near char none; };
struct scratch { $scratch struct carry carries[2]; };

const int64_t scratch_size = sizeof(struct scratch), step_rounds = $rounds;

/* Where the tensors of a step lie. */
$places

/* A large step is tables of calls: in each row, the number of a function and the places of its tensors. A
   place is the number of a memory and an offset there. */
$shared
#define NEAR(field) 0, __builtin_offsetof(struct near, field)
#define SCRATCH(field) 1, __builtin_offsetof(struct scratch, field)
#define NOW(field) 2, __builtin_offsetof(struct carry, field)
#define NEXT(field) 3, __builtin_offsetof(struct carry, field)
#define ARGUMENT(type, at) FIXED + at, 0
$tables
#define LOCATE(arguments) \
    w->base[0] = (char *)v, w->base[1] = (char *)w, w->base[2] = (char *)now, w->base[3] = (char *)next; \
    for (int64_t at = 0; at < arguments; at++) w->base[FIXED + at] = place[at] + n * member[at] + t * time[at];
#define CALL(table) \
    for (const int64_t *row = table, *end = row + sizeof table / sizeof *row; row < end;) \
        row = functions[*row](row + 1, w->base);

/* Everywhere else, a place is an address. */
#undef NEAR
#undef SCRATCH
#undef NOW
#undef NEXT
#undef ARGUMENT
#define NEAR(field) v->field
#define SCRATCH(field) w->field
#define NOW(field) now->field
#define NEXT(field) next->field
#define ARGUMENT(type, at) ((type *)w->base[FIXED + at])

/* Runs steps t0 to t1 of members n0 to n1. Returns -1, or twice the step in which an index is out of range;
   and 1 more if an integer is divided by zero there. */
int64_t run(int64_t n0, int64_t n1, int64_t t0, int64_t t1, char *const *place,
            const int64_t *member, const int64_t *time, char *memory, const volatile int *stop) {
    struct near local, *restrict v = &local;
    struct scratch *restrict w = (struct scratch *)memory;
    int bad = 0;
    for (int64_t n = n0; n < n1; n++) {
        if (*stop) return -1;
        const int64_t t = t0;
        struct carry *now = w->carries, *next = now;
        $of_member
        $load
        for (int64_t t = t0; t < t1; t++) {
            /* The two carries change places in turn. */
            struct carry *restrict now = w->carries + ((t - t0) & 1), *restrict next = w->carries + !((t - t0) & 1);
            $of_step
            $step
            if (bad) return 2 * t + (bad > 1);
        }
        now = w->carries + ((t1 - t0) & 1);
        $save
    }
    return -1;
}
