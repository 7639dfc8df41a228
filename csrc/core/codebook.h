// The NF4 codebook and its decision thresholds: the only C++ copy.
#ifndef FEINWERK_CORE_CODEBOOK_H_
#define FEINWERK_CORE_CODEBOOK_H_

namespace feinwerk {

// Quantiles of N(0, 1) scaled to [-1, 1], with an exact zero (QLoRA, arXiv 2305.14314, appendix E).
constexpr float kNf4Codebook[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

// thresholds[t] parts code t from code t + 1; a value equal to it takes the lower code. The last
// entry is never exceeded. The two rules differ by one ulp in four places (docs/format.md).
constexpr float kNf4ThresholdsCpu[16] = {
    -0x1.b239bp-1f,  -0x1.38a4ep-1f,  -0x1.d709p-2f,   -0x1.5bd4ecp-2f,
    -0x1.e079d8p-3f, -0x1.1a7178p-3f, -0x1.74f0e2p-5f, 0x1.45f5fep-5f,
    0x1.ec90c4p-4f,  0x1.a0cfcp-3f,   0x1.2b05a8p-2f,  0x1.8ea7f2p-2f,
    0x1.00da08p-1f,  0x1.491b5ep-1f,  0x1.b913b4p-1f,  __builtin_huge_valf(),
};
constexpr float kNf4ThresholdsCuda[16] = {
    -0x1.b239b2p-1f, -0x1.38a4ep-1f,  -0x1.d709p-2f,   -0x1.5bd4ecp-2f,
    -0x1.e079d8p-3f, -0x1.1a7178p-3f, -0x1.74f0e2p-5f, 0x1.45f5fep-5f,
    0x1.ec90c6p-4f,  0x1.a0cfcp-3f,   0x1.2b05a8p-2f,  0x1.8ea7f2p-2f,
    0x1.00da06p-1f,  0x1.491b5ep-1f,  0x1.b913b2p-1f,  __builtin_huge_valf(),
};

}  // namespace feinwerk

#endif  // FEINWERK_CORE_CODEBOOK_H_
