/* Measures the functions of whole vectors against those of one number, in units of the last place. */
#include <float.h>

#define COUNT 4096
static double x[COUNT], y[COUNT], worst;
static const double special[] = {0.0, -0.0, INFINITY, -INFINITY, NAN, 1.0, -1.0, 1e30, -1e30, 1e-40};

/* Numbers of all sizes from 2^-40 to 2^40, numbers near 0, and special ones. */
static void fill(void) {
    for (int i = 0; i < COUNT; i++) {
        const double share = (i / 2 + 0.5) / COUNT;
        const double size = i % 4 < 2 ? ldexp(1 + share, (int)(160 * share) - 40) : 24 * share;
        x[i] = i % 2 ? -size : size;
    }
    for (int i = 0; i < 10; i++) x[97 * i] = special[i];
    for (int i = 0; i < COUNT; i++) y[i] = x[(i * 1237 + 97) % COUNT];
}

static void compare(double got, double right, double unit, double least) {
    if (got == right ? signbit(got) == signbit(right) : got != got && right != right) return;
    const double units = fabs(got - right) / (unit * fabs(right) + least);
    if (!(units <= worst)) worst = got != right && units < INFINITY ? units : INFINITY;
}

/* No compiler takes vectors for a function that is called by its address. */
#define MEASURE(type, name, double_name, unit, least, parameters, ...) { \
    static type a[COUNT], b[COUNT], out[COUNT]; \
    double (*volatile one_by_one) parameters = double_name; \
    for (int i = 0; i < COUNT; i++) a[i] = x[i], b[i] = y[i]; \
    _Pragma("omp simd") for (int i = 0; i < COUNT; i++) out[i] = name(__VA_ARGS__); \
    for (int i = 0; i < COUNT; i++) compare(out[i], (type)one_by_one(__VA_ARGS__), unit, least); \
}
#define BOTH(name, parameters, ...) \
    MEASURE(double, name, name, DBL_EPSILON, DBL_MIN, parameters, __VA_ARGS__) \
    MEASURE(float, name##f, name, FLT_EPSILON, FLT_MIN, parameters, __VA_ARGS__)
#define OF_ONE(name) BOTH(name, (double), a[i])
#define OF_TWO(name) BOTH(name, (double, double), a[i], b[i])

double units(void) {
    fill();
    worst = 0;
    OF_ONE(exp) OF_ONE(exp2) OF_ONE(expm1) OF_ONE(log) OF_ONE(log1p) OF_ONE(log2) OF_ONE(log10)
    OF_ONE(sin) OF_ONE(cos) OF_ONE(tan) OF_ONE(asin) OF_ONE(acos) OF_ONE(atan) OF_ONE(erf) OF_ONE(erfc)
    OF_ONE(sinh) OF_ONE(cosh) OF_ONE(tanh) OF_ONE(asinh) OF_ONE(acosh) OF_ONE(atanh)
    OF_TWO(pow) OF_TWO(atan2) OF_TWO(hypot)
    return worst;
}
