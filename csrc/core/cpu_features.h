// What this CPU and operating system let us run.
#ifndef FEINWERK_CORE_CPU_FEATURES_H_
#define FEINWERK_CORE_CPU_FEATURES_H_

namespace feinwerk {

bool cpu_has_avx2();    // AVX2, FMA, F16C, BMI2
bool cpu_has_avx512();  // AVX-512 F, BW, DQ, VL
bool cpu_has_avx512_vnni();
bool cpu_has_avx512_bf16();
bool cpu_has_amx();   // tiles with bf16, and the kernel's permission to use them
bool cpu_has_neon();  // Advanced SIMD with fp16 and dot product

}  // namespace feinwerk

#endif  // FEINWERK_CORE_CPU_FEATURES_H_
