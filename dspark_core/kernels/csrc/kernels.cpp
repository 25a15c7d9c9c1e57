// The C interface that Python calls through ctypes. A single translation unit: it compiles in seconds
// and needs nothing but a C++17 compiler.

#include "coupling.h"
#include "decoder.h"
#include "draft.h"
#include "lookup.h"
#include "rejection.h"

using namespace dspark;

namespace {

template <class T, class O>
void run_linear(const Matrix& matrix, const void* x, int rows, void* out, int threads) {
  const Product<T> product{matrix, static_cast<const T*>(x), size_t(matrix.k), rows, threads};
  const StoreSink<O, false> sink{matrix, static_cast<O*>(out), size_t(matrix.n)};
  auto copy = std::make_shared<Matrix>(matrix);  // a late helper may read it after this function returns
  auto job = std::make_shared<Job>(1, [=](Job& j) {
    const Product<T> own{*copy, product.x, product.stride, product.rows, product.threads};
    multiply(j, 0, own, StoreSink<O, false>{*copy, sink.out, sink.stride});
  });
  Pool::instance().run(job, threads);
}

template <class T>
void run_normed_linear(const Matrix& matrix, const void* x, int rows, float* product, const float* norm, float eps,
                       void* out, int threads) {
  auto job = std::make_shared<Job>(2, [=](Job& j) {
    const Product<T> own{matrix, static_cast<const T*>(x), size_t(matrix.k), rows, threads};
    multiply(j, 0, own, StoreSink<float, false>{matrix, product, size_t(matrix.n)});
    j.phase(1, rows, [&](int row) {
      const size_t at = size_t(row) * matrix.n;
      rms_norm(product + at, norm, eps, matrix.n, static_cast<T*>(out) + at);
    });
  });
  Pool::instance().run(job, threads);
}

}  // namespace

extern "C" {

int32_t dspark_abi() { return 7; }

const char* dspark_instructions() {
#ifdef DSPARK_AMX_EMULATED
  return unit_at_hand() ? "emulated amx" : "amx not emulated";
#elif defined(DSPARK_AMX)
  return unit_at_hand() ? "avx512_bf16, amx" : "avx512_bf16";
#elif defined(DSPARK_AVX512_BF16)
  return "avx512_bf16";
#elif defined(__AVX512F__)
  return "avx512";
#elif defined(__AVX2__)
  return "avx2";
#else
  return "portable";
#endif
}

// Whether there are dedicated instructions for products of bytes; I8 pays off only with them.
int32_t dspark_byte_products() {
#ifdef DSPARK_AVX512_VNNI
  return 1;
#else
  return 0;
#endif
}

int64_t dspark_matrix_bytes(const Matrix* m) { return int64_t(m->panels()) * int64_t(m->panel_bytes()); }

void dspark_pack(const Matrix* m, const void* source, int32_t raw, void* data) {
  pack(*m, source, raw != 0, static_cast<uint8_t*>(data));
}

void dspark_unpack(const Matrix* m, int64_t first, int64_t rows, float* out) {
  for (int64_t row = 0; row < rows; ++row) unpack_row(*m, int(first + row), out + row * m->k);
}

// x and out are bfloat16 or float32 according to the flags; float32 inputs need a float32 matrix.
void dspark_linear(const Matrix* m, const void* x, int32_t x_bfloat16, int32_t rows, void* out,
                   int32_t out_bfloat16, int32_t threads) {
  if (!x_bfloat16)
    run_linear<float, float>(*m, x, rows, out, threads);
  else if (out_bfloat16)
    run_linear<uint16_t, uint16_t>(*m, x, rows, out, threads);
  else
    run_linear<uint16_t, float>(*m, x, rows, out, threads);
}

// logits [rows, vocab] -> the most likely index of each row, the lowest on ties.
void dspark_most_likely(const float* logits, int32_t rows, int32_t vocab, int64_t* out, int32_t threads) {
  auto job = std::make_shared<Job>(1, [=](Job& j) {
    j.phase(0, rows, [&](int row) { out[row] = most_likely(logits + size_t(row) * vocab, vocab); });
  });
  Pool::instance().run(job, std::min(threads, rows / 4 + 1));
}

// out [rows, n] = RMSNorm(x m). The flag gives the type of both x and out; product [rows, n] is scratch for
// the result before the norm.
void dspark_normed_linear(const Matrix* m, const void* x, int32_t bfloat16, int32_t rows, float* product,
                          const float* norm, float eps, void* out, int32_t threads) {
  if (bfloat16)
    run_normed_linear<uint16_t>(*m, x, rows, product, norm, eps, out, threads);
  else
    run_normed_linear<float>(*m, x, rows, product, norm, eps, out, threads);
}

void* dspark_decoder_create(const DecoderShape* shape, const Layer* layers) {
  return new Decoder(*shape, layers);
}

void dspark_decoder_destroy(void* decoder) { delete static_cast<Decoder*>(decoder); }

void dspark_decoder_forward(void* decoder, const Batch* batch) {
  static_cast<Decoder*>(decoder)->forward(*batch);
}

int64_t dspark_cache_bytes(int32_t layers, int32_t pages, int32_t page_tokens, int32_t kv_heads,
                           int32_t head_dim, int32_t item_bytes) {
  const CacheShape shape{pages, page_tokens, kv_heads, head_dim};
  return int64_t(layers) * int64_t(shape.layer_values()) * item_bytes;
}

}  // extern "C"
