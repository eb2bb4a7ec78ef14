// SHA-256 (FIPS 180-4).
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>

namespace mate::cuda {

using Digest = std::array<std::uint8_t, 32>;

Digest sha256(std::string_view text);

/// In hexadecimal digits.
std::string to_hex(const Digest& digest);

}  // namespace mate::cuda
