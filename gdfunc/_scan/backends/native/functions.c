/* The functions of C's library. */
#include <math.h>
#include <stdint.h>

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

#ifdef _WIN32 /* in place of MinGW's runtime, which zig would take minutes to compile */
__declspec(dllimport) double lgamma(double); /* else the import library takes them for data */
__declspec(dllimport) float lgammaf(float);
#define hypotf(x, y) ((float)hypot(x, y))
int DllMainCRTStartup(void *library, unsigned reason, void *reserved) { return 1; }
/* Touches a frame of %rax bytes page by page, from above: so the system gives it memory. No register changes. */
__asm__(".globl ___chkstk_ms\n"
        "___chkstk_ms: push %rcx\n push %rax\n lea 24(%rsp), %rcx\n"
        "1: cmp $4096, %rax\n jbe 2f\n"
        "sub $4096, %rcx\n testb $0, (%rcx)\n sub $4096, %rax\n jmp 1b\n"
        "2: sub %rax, %rcx\n testb $0, (%rcx)\n pop %rax\n pop %rcx\n ret\n");
#endif
