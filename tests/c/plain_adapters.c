// Plain C definitions of the adapter operations, in doubles and from the formulas alone:
//
//   y = x W^T + s (x~ A^T) B^T + bias                                              LoRA
//   y = g (x W^T + s (x~ A^T) B^T) + bias,  g = magnitude / weight_norm            DoRA
//   y = x W^T + D + (g - 1) (x~ W^T + D) + bias,  D = s (x~ A^T) B^T               under dropout
//
// x~ is x after dropout. Every sum carries the sum of its |terms| along.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "plain.h"

void plain_philox(const uint32_t counter[4], const uint32_t key[2], uint32_t words[4]) {
  uint32_t c[4] = {counter[0], counter[1], counter[2], counter[3]}, k[2] = {key[0], key[1]};
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = (uint64_t)0xD2511F53u * c[0], third = (uint64_t)0xCD9E8D57u * c[2];
    const uint32_t next[4] = {(uint32_t)(third >> 32) ^ c[1] ^ k[0], (uint32_t)third,
                              (uint32_t)(first >> 32) ^ c[3] ^ k[1], (uint32_t)first};
    memcpy(c, next, sizeof c);
    k[0] += 0x9E3779B9u;
    k[1] += 0xBB67AE85u;
  }
  memcpy(words, c, sizeof c);
}

double plain_dropout(const feinwerk_dropout* dropout, int64_t row, int64_t column) {
  if (dropout->drop_below == 0) return 1;
  const uint64_t index = (uint64_t)(16 * (column / 64) + column % 16), r = (uint64_t)row;
  const uint32_t counter[4] = {(uint32_t)index, (uint32_t)(index >> 32), (uint32_t)r,
                               (uint32_t)(r >> 32)};
  const uint32_t key[2] = {(uint32_t)dropout->seed, (uint32_t)(dropout->seed >> 32)};
  uint32_t words[4];
  plain_philox(counter, key, words);
  return words[column % 64 / 16] < dropout->drop_below ? 0 : (double)dropout->keep_scale;
}

// A sum and the sum of the sizes of its terms.
typedef struct sum {
  double value, size;
} sum;
static void add(sum* to, double factor, double value, double size) {
  to->value += factor * value;
  to->size += fabs(factor) * size;
}
static void add_term(sum* to, double a, double b) { add(to, a, b, fabs(b)); }
static sum read(plain_result from, int64_t at) { return (sum){from.value[at], from.size[at]}; }
static void write(plain_result to, int64_t at, sum from) {
  to.value[at] = from.value;
  to.size[at] = from.size;
}

static const feinwerk_adapter* adapter_of_row(const feinwerk_adapter* adapters, int64_t count,
                                              int64_t row) {
  for (int64_t e = 0; e < count; ++e)
    if (row >= adapters[e].row_begin && row < adapters[e].row_end) return adapters + e;
  return NULL;
}

static double gain_of(const feinwerk_adapter* adapter, int64_t n) {
  if (!adapter || !adapter->magnitude) return 1;
  const double norm = (double)adapter->weight_norm[n];
  return norm == 0 ? 0 : (double)adapter->magnitude[n] / norm;
}

// Whether DoRA scales another sum than the one that LoRA gives.
static int apart(const feinwerk_adapter* adapter, const feinwerk_dropout* dropout) {
  return adapter && adapter->magnitude && dropout->drop_below != 0;
}

void plain_weight_norm(const feinwerk_adapter* adapter, const double* weight, int64_t n, int64_t k,
                       plain_result norm, double* cross) {
  for (int64_t i = 0; i < n; ++i) {
    double square = 0, size = 0, part = 0;
    for (int64_t c = 0; c < k; ++c) {
      sum change = {0, 0};
      for (int64_t j = 0; j < adapter->r; ++j)
        add_term(&change, (double)adapter->scaling * (double)adapter->lora_B[i * adapter->r + j],
                 (double)adapter->lora_A[j * k + c]);
      const double w = weight[i * k + c], both = fabs(w) + change.size;
      square += (w + change.value) * (w + change.value);
      size += both * both;
      part += 2 * fabs(w) * change.size;
    }
    write(norm, i, (sum){sqrt(square), size});
    cross[i] = part;
  }
}

// The products of one row of x: with W, with W after dropout, and D.
typedef struct row_products {
  sum base, through, delta;
} row_products;
static row_products multiply_row(const double* x, const double* dropped, const double* weight,
                                 int64_t k, const feinwerk_adapter* adapter, int64_t n,
                                 plain_result s) {
  row_products out = {{0, 0}, {0, 0}, {0, 0}};
  for (int64_t c = 0; c < k; ++c) {
    add_term(&out.base, x[c], weight[n * k + c]);
    add_term(&out.through, dropped[c], weight[n * k + c]);
  }
  for (int64_t j = 0; adapter && j < adapter->r; ++j)
    add(&out.delta, (double)adapter->scaling * (double)adapter->lora_B[n * adapter->r + j],
        s.value[j], s.size[j]);
  return out;
}

// y but for the bias.
static sum combine(row_products p, double g, int is_apart) {
  sum y = {0, 0};
  add(&y, is_apart ? 1 : g, p.base.value, p.base.size);
  add(&y, is_apart ? 1 : g, p.delta.value, p.delta.size);
  if (is_apart) {
    // g - 1 is rounded: its two terms count.
    y.value += (g - 1) * (p.through.value + p.delta.value);
    y.size += (fabs(g) + 1) * (p.through.size + p.delta.size);
  }
  return y;
}

static void read_row(const void* x, feinwerk_dtype dtype, int64_t row, int64_t k,
                     const feinwerk_dropout* dropout, double* out, double* dropped) {
  for (int64_t c = 0; c < k; ++c) {
    out[c] = (double)plain_load(x, dtype, row * k + c);
    dropped[c] = out[c] * plain_dropout(dropout, row, c);
  }
}

static double bias_of(const void* bias, feinwerk_dtype dtype, int64_t n) {
  return bias ? (double)plain_load(bias, dtype, n) : 0;
}

void plain_lora_linear(const feinwerk_lora_linear_args* args, const double* weight, plain_result y,
                       plain_result s) {
  const int64_t n = args->weight.nf4.rows, k = args->weight.nf4.cols;
  double* x = malloc((size_t)(2 * k + 1) * sizeof *x);
  for (int64_t m = 0; m < args->m; ++m) {
    const feinwerk_adapter* adapter = adapter_of_row(args->adapters, args->adapter_count, m);
    read_row(args->x, args->dtype, m, k, &args->dropout, x, x + k);
    const plain_result row = {s.value + m * args->s_cols, s.size + m * args->s_cols};
    for (int64_t j = 0; adapter && j < adapter->r; ++j) {
      sum found = {0, 0};
      for (int64_t c = 0; c < k; ++c)
        add_term(&found, x[k + c], (double)adapter->lora_A[j * k + c]);
      write(row, j, found);
    }
    for (int64_t i = 0; i < n; ++i) {
      const row_products p = multiply_row(x, x + k, weight, k, adapter, i, row);
      sum value = combine(p, gain_of(adapter, i), apart(adapter, &args->dropout));
      add_term(&value, 1, bias_of(args->bias, args->bias_dtype, i));
      write(y, m * n + i, value);
    }
  }
  free(x);
}

// grad_magnitude's part of one row: what the gain multiplied, times grad_y, by the norm.
static void add_magnitudes(const feinwerk_lora_linear_backward_args* args, const double* weight,
                           int64_t m, const feinwerk_adapter* adapter, const double* x,
                           const double* dy, const plain_gradients* out) {
  const int64_t n = args->weight.nf4.rows, k = args->weight.nf4.cols, e = adapter - args->adapters;
  double* given = malloc((size_t)(2 * adapter->r) * sizeof *given);
  for (int64_t j = 0; j < adapter->r; ++j) {
    given[j] = (double)args->s[m * args->s_cols + j];
    given[adapter->r + j] = fabs(given[j]);
  }
  for (int64_t i = 0; i < n; ++i) {
    const double norm = (double)adapter->weight_norm[i], g = gain_of(adapter, i);
    if (norm == 0) continue;
    const row_products p =
        multiply_row(x, x + k, weight, k, adapter, i, (plain_result){given, given + adapter->r});
    sum all = read(out->magnitude[e], i);
    add(&all, dy[i] / norm, p.through.value, p.through.size);
    add(&all, dy[i] / norm, p.delta.value, p.delta.size);
    write(out->magnitude[e], i, all);
    if (!args->y || apart(adapter, &args->dropout)) continue;
    // From y: (y - bias) / magnitude, off by y's rounding and that of the difference.
    const double y = (double)plain_load(args->y, args->dtype, m * n + i);
    const double bias = bias_of(args->bias, args->bias_dtype, i);
    const double off = fabs(y - bias - g * (p.through.value + p.delta.value));
    out->lost[e][i] +=
        fabs(dy[i] / (double)adapter->magnitude[i]) * (off + 0x1p-24 * (fabs(y) + fabs(bias)));
  }
  free(given);
}

static void clear(plain_result result, int64_t count) {
  memset(result.value, 0, (size_t)count * sizeof(double));
  memset(result.size, 0, (size_t)count * sizeof(double));
}

void plain_lora_linear_backward(const feinwerk_lora_linear_backward_args* args,
                                const double* weight, const plain_gradients* out) {
  const int64_t n = args->weight.nf4.rows, k = args->weight.nf4.cols;
  clear(out->bias, n);
  int64_t most = 1;
  for (int64_t e = 0; e < args->adapter_count; ++e) {
    const int64_t r = args->adapters[e].r;
    clear(out->A[e], r * k);
    clear(out->B[e], n * r);
    clear(out->magnitude[e], n);
    memset(out->lost[e], 0, (size_t)n * sizeof(double));
    if (r > most) most = r;
  }
  double* x = malloc((size_t)(2 * k + n + 1) * sizeof *x);
  double* const dy = x + 2 * k;
  sum* ds = malloc((size_t)most * sizeof *ds);
  for (int64_t m = 0; m < args->m; ++m) {
    const feinwerk_adapter* adapter = adapter_of_row(args->adapters, args->adapter_count, m);
    const int64_t r = adapter ? adapter->r : 0, e = adapter ? adapter - args->adapters : 0;
    const int is_apart = apart(adapter, &args->dropout);
    read_row(args->x, args->dtype, m, k, &args->dropout, x, x + k);
    for (int64_t i = 0; i < n; ++i) {
      dy[i] = (double)plain_load(args->grad_y, args->dtype, m * n + i);
      sum all = read(out->bias, i);
      add_term(&all, 1, dy[i]);
      write(out->bias, i, all);
    }
    for (int64_t j = 0; j < r; ++j) {
      ds[j] = (sum){0, 0};
      const double s = (double)args->s[m * args->s_cols + j];
      for (int64_t i = 0; i < n; ++i) {
        const double factor = (double)adapter->scaling * gain_of(adapter, i);
        add_term(ds + j, factor * (double)adapter->lora_B[i * r + j], dy[i]);
        sum grad_B = read(out->B[e], i * r + j);
        add_term(&grad_B, factor * dy[i], s);
        write(out->B[e], i * r + j, grad_B);
      }
      for (int64_t c = 0; c < k; ++c) {
        sum grad_A = read(out->A[e], j * k + c);
        add(&grad_A, x[k + c], ds[j].value, ds[j].size);
        write(out->A[e], j * k + c, grad_A);
      }
    }
    if (adapter && adapter->magnitude) add_magnitudes(args, weight, m, adapter, x, dy, out);
    for (int64_t c = 0; c < k; ++c) {
      const double keep = plain_dropout(&args->dropout, m, c);
      sum all = {0, 0};
      double scaled = 0;
      for (int64_t i = 0; i < n; ++i) {
        const double g = gain_of(adapter, i), term = dy[i] * weight[i * k + c];
        add_term(&all, is_apart ? 1 : g, term);
        if (is_apart) {
          all.value += keep * (g - 1) * term;
          all.size += keep * (fabs(g) + 1) * fabs(term);
        }
        if (adapter && adapter->magnitude)
          scaled += is_apart ? keep * fabs((g - 1) * term) : fabs(g * term);
      }
      for (int64_t j = 0; j < r; ++j)
        add(&all, keep * (double)adapter->lora_A[j * k + c], ds[j].value, ds[j].size);
      write(out->x, m * k + c, all);
      out->scaled[m * k + c] = scaled;
    }
  }
  free(x);
  free(ds);
}
