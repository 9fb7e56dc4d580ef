#pragma once
#include <stdint.h>
#include <string.h>

struct __half {
    uint16_t bits;
};
inline float __half2float(__half x) {
    const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
    const float sign = x.bits >> 15 ? -1.0f : 1.0f;
    if (exponent == 31) return mantissa ? __builtin_nanf("") : sign * __builtin_inff();
    return sign * (exponent ? __builtin_ldexpf(static_cast<float>(1024 + mantissa), exponent - 25)
                            : __builtin_ldexpf(static_cast<float>(mantissa), -24));
}
