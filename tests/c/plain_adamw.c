// adamw_step in plain C, element by element (docs/ops/adamw_step.md says the same in words).
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "plain.h"

static int ascending(const void* a, const void* b) {
  const float x = *(const float*)a, y = *(const float*)b;
  return (x > y) - (x < y);
}

void plain_dynamic_map(int is_signed, float map[256]) {
  static const float powers[] = {1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f, 1.0f};
  int count = 0;
  map[count++] = 0;
  map[count++] = 1;
  for (int decade = 0; decade < 7; ++decade) {
    const int cells = (is_signed ? 1 : 2) << decade;
    const double low = 0.1f, step = (1.0f - 0.1f) / (float)cells;
    float edges[129];
    for (int i = 0; i <= cells; ++i)
      edges[i] = (float)(2 * i < cells + 1 ? low + step * i : 1 - step * (cells - i));
    for (int i = 0; i < cells; ++i) {
      const float centre = (edges[i] + edges[i + 1]) / 2 * powers[decade];
      map[count++] = centre;
      if (is_signed) map[count++] = -centre;
    }
  }
  qsort(map, 256, sizeof *map, ascending);
}

// How many midpoints lie below s: they ascend, so half of what is left falls away at each look.
static int nearest(const float* map, float s) {
  int low = 0, high = 255;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (s > (map[middle] + map[middle + 1]) * 0.5f)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

static int64_t block_of(const feinwerk_adamw_tensor* tensor, int64_t blocksize, int64_t i) {
  const int64_t blocks = tensor->cols / blocksize + (tensor->cols % blocksize != 0);
  return i / tensor->cols * blocks + i % tensor->cols / blocksize;
}

static float load_moment(const feinwerk_adamw_step_args* args, const feinwerk_adamw_tensor* tensor,
                         int is_signed, const float* map, int64_t i) {
  const void* states = is_signed ? tensor->exp_avg : tensor->exp_avg_sq;
  if (args->state != FEINWERK_STATE_DYNAMIC8)
    return plain_load(states, (feinwerk_dtype)args->state, i);
  const float* absmax = is_signed ? tensor->exp_avg_absmax : tensor->exp_avg_sq_absmax;
  return map[((const uint8_t*)states)[i]] * absmax[block_of(tensor, args->blocksize, i)];
}

static void encode(const feinwerk_adamw_step_args* args, const feinwerk_adamw_tensor* tensor,
                   int is_signed, const float* map, const float* values) {
  uint8_t* codes = is_signed ? tensor->exp_avg : tensor->exp_avg_sq;
  const float* absmax = is_signed ? tensor->exp_avg_absmax : tensor->exp_avg_sq_absmax;
  for (int64_t i = 0; i < tensor->rows * tensor->cols; ++i) {
    const float most = absmax[block_of(tensor, args->blocksize, i)];
    const int usable = most >= 0x1p-126f;
    const float s = values[i] * (usable ? 1.0f / most : 0.0f);
    int code = nearest(map, isnan(s) ? 0.0f : s);
    if (!is_signed && usable && code == 0 && values[i] > 0) code = 1;
    codes[i] = (uint8_t)code;
  }
}

static void find_absmax(const feinwerk_adamw_step_args* args, const feinwerk_adamw_tensor* tensor,
                        const float* m, const float* v) {
  float *first = tensor->exp_avg_absmax, *second = tensor->exp_avg_sq_absmax;
  for (int64_t b = 0; b < tensor->absmax_count; ++b) first[b] = second[b] = 0;
  for (int64_t i = 0; i < tensor->rows * tensor->cols; ++i) {
    const int64_t b = block_of(tensor, args->blocksize, i);
    if (fabsf(m[i]) > first[b]) first[b] = fabsf(m[i]);
    if (v[i] > second[b]) second[b] = v[i];
  }
  for (int64_t b = 0; b < tensor->absmax_count; ++b)
    if (isinf(first[b]) || isinf(second[b])) first[b] = second[b] = 0;
}

static uint32_t random_word(const feinwerk_adamw_step_args* args,
                            const feinwerk_adamw_tensor* tensor, int64_t i) {
  const uint64_t column = (uint64_t)(tensor->first_element + i);
  const uint64_t index = 16 * (column / 64) + column % 16;
  const uint32_t counter[4] = {(uint32_t)index, (uint32_t)(index >> 32),
                               (uint32_t)tensor->parameter, (uint32_t)tensor->step};
  const uint32_t key[2] = {(uint32_t)args->seed, (uint32_t)(args->seed >> 32)};
  uint32_t words[4];
  plain_philox(counter, key, words);
  return words[column % 64 / 16];
}

static float load_param(const feinwerk_adamw_step_args* args, const feinwerk_adamw_tensor* tensor,
                        int64_t i) {
  if (args->master == FEINWERK_MASTER_FLOAT32) return ((const float*)tensor->param)[i];
  uint32_t bits = (uint32_t)((const uint16_t*)tensor->param)[i] << 16;
  const int32_t low = args->master == FEINWERK_MASTER_REMAINDER ? tensor->remainder[i] : 0;
  bits = bits + (uint32_t)low;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static void store_param(const feinwerk_adamw_step_args* args, const feinwerk_adamw_tensor* tensor,
                        int64_t i, float value) {
  if (args->master == FEINWERK_MASTER_FLOAT32) {
    ((float*)tensor->param)[i] = value;
    return;
  }
  uint32_t bits = 0x7fc00000, random = 0;
  if (!isnan(value)) {
    memcpy(&bits, &value, sizeof bits);
    random = random_word(args, tensor, i) >> 16;
  }
  uint16_t* high = (uint16_t*)tensor->param + i;
  if (args->master == FEINWERK_MASTER_STOCHASTIC) {
    *high = (uint16_t)((bits + random) >> 16);
    return;
  }
  *high = (uint16_t)((bits + 0x8000) >> 16);
  const uint16_t low = (uint16_t)(bits - ((uint32_t)*high << 16));
  memcpy(tensor->remainder + i, &low, sizeof low);
}

static void step_tensor(const feinwerk_adamw_step_args* args, const feinwerk_adamw_tensor* tensor,
                        float maps[2][256]) {
  const int64_t count = tensor->rows * tensor->cols;
  if (count == 0) return;
  const double t = (double)tensor->step;
  const float weight1 = (float)(1 - args->beta1), beta2 = (float)args->beta2;
  const float weight2 = (float)(1 - args->beta2), eps = (float)args->eps;
  const float shrink = (float)(1 - args->lr * args->weight_decay);
  const float size = (float)(args->lr / (1 - pow(args->beta1, t)));
  const float correction = (float)(1 / sqrt(1 - pow(args->beta2, t)));
  float *m = malloc((size_t)count * sizeof(float)), *v = malloc((size_t)count * sizeof(float));
  for (int64_t i = 0; i < count; ++i) {
    const float g = plain_load(tensor->grad, args->grad_dtype, i) * args->grad_factor;
    const float old_m = load_moment(args, tensor, 1, maps[1], i);
    const float old_v = load_moment(args, tensor, 0, maps[0], i);
    m[i] = old_m + (g - old_m) * weight1;
    v[i] = old_v * beta2 + (g * g) * weight2;
    const float ratio = m[i] / (sqrtf(v[i]) * correction + eps);
    store_param(args, tensor, i, load_param(args, tensor, i) * shrink - ratio * size);
  }
  if (args->state == FEINWERK_STATE_DYNAMIC8) {
    find_absmax(args, tensor, m, v);
    encode(args, tensor, 1, maps[1], m);
    encode(args, tensor, 0, maps[0], v);
  } else {
    for (int64_t i = 0; i < count; ++i) {
      plain_store(tensor->exp_avg, (feinwerk_dtype)args->state, i, m[i]);
      plain_store(tensor->exp_avg_sq, (feinwerk_dtype)args->state, i, v[i]);
    }
  }
  free(m);
  free(v);
}

void plain_adamw_step(const feinwerk_adamw_step_args* args) {
  float maps[2][256];
  plain_dynamic_map(0, maps[0]);
  plain_dynamic_map(1, maps[1]);
  for (int64_t i = 0; i < args->tensor_count; ++i) step_tensor(args, args->tensors + i, maps);
}

// One row in the order of docs/ops/square_sum.md.
static double row_sum(const feinwerk_rows* rows, int64_t row) {
  enum { kLanes = 16, kBlock = 1024 };
  double sum = 0;
  for (int64_t first = 0; first < rows->cols; first += kBlock) {
    double lane[kLanes] = {0};
    for (int64_t i = first; i < rows->cols && i < first + kBlock; ++i) {
      const double x = plain_load(rows->data, rows->dtype, row * rows->cols + i);
      lane[(i - first) % kLanes] += x * x;
    }
    for (int half = kLanes / 2; half > 0; half /= 2)
      for (int j = 0; j < half; ++j) lane[j] += lane[j + half];
    sum += lane[0];
  }
  return sum;
}

void plain_square_sum(const feinwerk_rows* rows, int64_t* limbs) {
  enum { kLimbs = FEINWERK_SQUARE_SUM_LENGTH - 2 };
  for (int64_t row = 0; row < rows->rows; ++row) {
    double rest = row_sum(rows, row);
    if (!isfinite(rest)) {
      ++limbs[isnan(rest) ? kLimbs + 1 : kLimbs];
      continue;
    }
    for (int limb = kLimbs - 1; limb >= 0; --limb) {
      const double unit = ldexp(1, 30 * limb - 300), digit = floor(rest / unit);
      limbs[limb] += (int64_t)digit;
      rest -= digit * unit;
    }
  }
}
