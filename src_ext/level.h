/* The x86-64 level of this processor and its operating system: 1 to 4; 0 on other architectures. Compiled for the baseline. */
#ifndef FASTLOSS_LEVEL_H
#define FASTLOSS_LEVEL_H

#if defined(__x86_64__)
#include <cpuid.h>
/* What compilers do not all know by name: MOVBE, F16C and LZCNT. */
static int fastloss_has_rest_of_v3(void) {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & 1u << 22) || !(c & 1u << 29)) return 0;
    return __get_cpuid(0x80000001u, &a, &b, &c, &d) && (c & 1u << 5);
}
static int fastloss_level(void) {
    __builtin_cpu_init();
#define HAS(feature) __builtin_cpu_supports(feature)
    if (!(HAS("sse3") && HAS("ssse3") && HAS("sse4.1") && HAS("sse4.2") && HAS("popcnt"))) return 1;
    if (!(HAS("avx") && HAS("avx2") && HAS("bmi") && HAS("bmi2") && HAS("fma") && fastloss_has_rest_of_v3())) return 2;
    if (!(HAS("avx512f") && HAS("avx512bw") && HAS("avx512cd") && HAS("avx512dq") && HAS("avx512vl"))) return 3;
    return 4;
#undef HAS
}
#else
static int fastloss_level(void) { return 0; }
#endif

#endif
