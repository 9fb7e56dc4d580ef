#include "runtime/caches.h"

#include <fstream>
#include <string>

namespace amil {
namespace {

// Bytes of a cache as Linux knows it, or otherwise what server processors have at least. (sysconf names ten times the
// L3 cache on some virtual machines.)
int64_t size_of_cache(int level, int64_t otherwise) {
    const std::string folder = "/sys/devices/system/cpu/cpu0/cache/index";
    for (int index = 0; index < 8; ++index) {
        const std::string cache = folder + std::to_string(index);
        int found = 0;
        int64_t kib = 0;
        std::string unit;
        std::ifstream(cache + "/level") >> found;
        if (found == level && std::ifstream(cache + "/size") >> kib >> unit && unit == "K" && kib > 0) return kib << 10;
    }
    return otherwise;
}

}  // namespace

const Caches& caches() {
    static const Caches found{size_of_cache(2, 1 << 20), size_of_cache(3, 32 << 20)};
    return found;
}

}  // namespace amil
