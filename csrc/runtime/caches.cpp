#include "runtime/caches.h"

#include <fstream>
#include <string>

namespace amil {
namespace {

// Size of a cache in bytes as reported by Linux, or `fallback`, a lower bound for server processors. (sysconf reports
// ten times the actual L3 size on some virtual machines.)
int64_t size_of_cache(int level, int64_t fallback) {
    const std::string folder = "/sys/devices/system/cpu/cpu0/cache/index";
    for (int index = 0; index < 8; ++index) {
        const std::string cache = folder + std::to_string(index);
        int found = 0;
        int64_t kib = 0;
        std::string unit;
        std::ifstream(cache + "/level") >> found;
        if (found == level && std::ifstream(cache + "/size") >> kib >> unit && unit == "K" && kib > 0) return kib << 10;
    }
    return fallback;
}

}  // namespace

const Caches& caches() {
    static const Caches sizes{size_of_cache(2, 1 << 20), size_of_cache(3, 32 << 20)};
    return sizes;
}

}  // namespace amil
