// The decoder's forward in whole numbers on a CPU, compiled by building.py and called through bindings.py.
//
// Every function runs on `threads` threads. A row's result is the same to the last bit whatever rows it is called with.
#include <omp.h>

#include <algorithm>
#include <array>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__AMX_INT8__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

// Several builds may be loaded into one process. They share nothing, because only what C calls can be seen; what the
// system defines is included above, as it has to be seen.
#pragma GCC visibility push(hidden)
#include "attention.h"
#include "blocks.h"

namespace {

constexpr int64_t ALONE = 2;  // most rows that every thread prepares for itself
constexpr int DONE = 0, NO_ROOM = 1, NO_MEMORY = 2;  // status of a call

// Return the result of `work`, or NO_MEMORY: no exception may reach the caller, which is not C++.
template <class Work>
int guarded(Work work) {
    try {
        return work();
    } catch (const std::bad_alloc&) {
        return NO_MEMORY;
    }
}

// This thread's share of `count` items.
struct Share {
    int64_t begin, end;
    explicit Share(int64_t count) {
        const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
        begin = count * thread / threads, end = count * (thread + 1) / threads;
    }
};

void normalise(const float* x, const float* gain, int64_t width, float eps, float* out) {
    Floats squares = {};
    for (int64_t i = 0; i < width; i += LANES) {
        const Floats v = load(x + i);
        squares += v * v;
    }
    const float inverse = 1 / std::sqrt(sum(squares) / width + eps);
    for (int64_t i = 0; i < width; i += LANES)
        store(out + i, gain ? load(x + i) * inverse * load(gain + i) : load(x + i) * inverse);
}

// Rows as the matrices that multiply them need them.
struct Inputs {
    Quantised bytes;
    std::vector<int16_t> words;
    std::vector<float> scale, sum;

    void reserve(const Matrix& m, int64_t rows) {
        if (m.kind == INT8) return bytes.reserve(rows, m.stride());
        if (words.size() < size_t(rows * m.inputs)) words.resize(rows * m.inputs);
        if (scale.size() < size_t(rows * m.inputs / SPAN))
            scale.resize(rows * m.inputs / SPAN), sum.resize(rows * m.inputs / SPAN);
    }

    // Write rows [begin, end) of x, after a norm if there is a gain.
    void write(const float* x, int64_t begin, int64_t end, const float* gain, float eps, const Matrix& m) {
        std::vector<float> row(m.stride());
        for (int64_t r = begin; r < end; r++) {
            const float* read = x + r * m.inputs;
            if (gain) normalise(read, gain, m.inputs, eps, row.data()), read = row.data();
            if (m.kind == INT8) {
                if (!gain) std::memcpy(row.data(), read, m.inputs * sizeof(float));
                quantise(row.data(), m.inputs, bytes.rows.data() + r * m.stride(), &bytes.scale[r], &bytes.total[r]);
            } else {
                const int64_t spans = r * m.inputs / SPAN;
                quantise_blocks(read, m.inputs, words.data() + r * m.inputs, &scale[spans], &sum[spans]);
            }
        }
    }
};

// The address from which this thread reads a matrix, or null.
const int8_t* beginning(const Matrix* m) {
    if (!m || m->next) return nullptr;
    const int64_t first = Share(m->columns()).begin;
    return m->kind == INT8 ? m->panel(first) : m->weight + first * block_format(m->kind).panel(*m);
}

// This thread's share of the outputs of a product; `after` is the matrix of its next product, or null.
template <class Sink>
void multiply(const Matrix& m, const Inputs& x, int rows, Sink& sink, const Matrix* after = nullptr) {
    int64_t columns = 0;
    for (const Matrix* part = &m; part; part = part->next) columns += part->columns();
    const Share share(columns);
    int64_t before = 0, offset = 0;  // columns and outputs of the parts before
    for (const Matrix* part = &m; part; part = part->next) {
        const int64_t begin = std::max<int64_t>(share.begin - before, 0);
        const int64_t end = std::min<int64_t>(share.end - before, part->columns());
        if (part->kind == INT8)
            product(*part, x.bytes, rows, begin, end, sink, beginning(after));
        else
            block_product(*part, {x.words.data(), x.scale.data(), x.sum.data(), part->inputs}, rows, begin, end, offset,
                          sink, (const uint8_t*)beginning(after));
        before += part->columns(), offset += part->outputs;
    }
}

template <class Sink>
void multiply(const Matrix& m, const Inputs& x, int rows, Sink&& sink, const Matrix* after = nullptr) {
    multiply(m, x, rows, sink, after);
}

#include "proposals.h"

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

struct Layer {
    Matrix qkv, out, gate_up, down;
    const float *input_norm, *post_norm;
    const float *q_norm, *k_norm;  // [head_dim], or null
    int64_t hidden, heads, kv_heads, head_dim;
    float eps;
};

struct Cache {  // [2][layers][sequences][kv_heads][capacity][head_dim] of numbers of `size` bytes: bfloat16, or float
    char* data;
    int64_t size;
    int64_t layers, sequences, capacity;
    int64_t batch, length;  // sequences that have new rows; the committed rows of each
    // [batch], the sequences that have new rows, and [sequences], their committed rows; null: all have `length` rows.
    const int64_t *slots, *lengths;

    bool floats() const { return size == sizeof(float); }

    // Write some numbers of a row's key or value.
    void write(const float* numbers, char* to, int64_t count) const {
        for (int64_t i = 0; i < count; i += LANES) {
            if (floats())
                store((float*)to + i, load(numbers + i));
            else
                store_bfloat16((uint16_t*)to + i, load(numbers + i));
        }
    }

    int64_t sequence(int64_t entry) const { return slots ? slots[entry] : entry; }
    int64_t committed(int64_t entry) const { return slots ? lengths[slots[entry]] : length; }
};

struct LowRank {  // down [rank][inputs] and up [rank][outputs]; rank 0 adds nothing
    const float *down, *up;
    int64_t rank;

    // out += up (down x) for this thread's rows; x is normed if there is a gain.
    void add(const float* x, int64_t rows, const Matrix& m, const float* gain, float eps, float* out,
             int64_t stride) const {
        std::vector<float> normed(m.inputs), inner(rank);
        const Share share(rows);
        for (int64_t r = share.begin; r < share.end; r++) {
            const float* row = x + r * m.inputs;
            if (gain) normalise(row, gain, m.inputs, eps, normed.data()), row = normed.data();
            for (int64_t k = 0; k < rank; k++) {
                Floats dot = {};
                for (int64_t i = 0; i < m.inputs; i += LANES) dot += load(row + i) * load(down + k * m.inputs + i);
                inner[k] = sum(dot);
            }
            for (int64_t j = 0; j < m.width(); j += LANES) {
                Floats total = load(out + r * stride + j);
                for (int64_t k = 0; k < rank; k++) total += load(up + k * m.width() + j) * inner[k];
                store(out + r * stride + j, total);
            }
        }
    }
};

struct Added {  // what an adapter adds to the products of a layer
    LowRank qkv, out;
};

struct Tables {  // rotary positions [rows][head_dim]; the sine has the sign of the half that it multiplies
    const float *cos, *sin;
    int64_t rows;
};

// Request the tile registers from the system; 0 if it does not grant them.
int usable() {
#if defined(__AMX_INT8__) && defined(__linux__)
    return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
#else
    return 1;
#endif
}

// Return how products use the processor's instructions for int8, with which several rows cost little more than one: 2
// for tiles, 1 for vectors, 0 for none.
int accelerated() { return Products::KIND; }

void rms_norm(const float* x, const float* gain, int64_t rows, int64_t width, float eps, float* out) {
    for (int64_t r = 0; r < rows; r++) normalise(x + r * width, gain, width, eps, out + r * width);
}

// out [rows][stride] = x Wᵀ + b; x is normed if there is a gain.
int linear(const Matrix* m, const float* x, int64_t rows, const float* gain, float eps, float* out, int64_t stride,
           int64_t threads) {
    static thread_local Inputs inputs;
    Inputs& q = inputs;
    if (guarded([&] { return q.reserve(*m, rows), DONE; })) return NO_MEMORY;
#pragma omp parallel num_threads(threads)
    {
        const Tiles tiles;
        const Share own(rows);
        q.write(x, own.begin, own.end, gain, eps, *m);
#pragma omp barrier
        multiply(*m, q, rows, Store{out, stride});
    }
    return DONE;
}

// The index of the largest output of every row; rows are normed if there is a gain.
int linear_argmax(const Matrix* m, const float* x, int64_t rows, const float* gain, float eps, int64_t* out,
                  int64_t threads) {
    static thread_local Inputs inputs;
    Inputs& q = inputs;
    std::vector<Best> found;
    const auto reserve = [&] {
        q.reserve(*m, rows);
        found.assign(threads, Best(rows, m->width()));
        return DONE;
    };
    if (guarded(reserve)) return NO_MEMORY;
#pragma omp parallel num_threads(threads)
    {
        const Tiles tiles;
        const Share own(rows);
        q.write(x, own.begin, own.end, gain, eps, *m);
#pragma omp barrier
        multiply(*m, q, rows, found[omp_get_thread_num()]);
    }
    for (int64_t r = 0; r < rows; r++) {
        int best = 0;  // threads have ascending columns
        for (int t = 1; t < threads; t++)
            if (found[t].value[r] > found[best].value[r]) best = t;
        out[r] = found[best].index[r];
    }
    return DONE;
}

// out [count][inputs]: the weights of some outputs. Return NO_ROOM if there is no such output; then nothing was done.
int weight_rows(const Matrix* m, const int64_t* outputs, int64_t count, float* out) {
    for (int64_t i = 0; i < count; i++)
        if (outputs[i] < 0 || outputs[i] >= m->width()) return NO_ROOM;
    for (int64_t i = 0; i < count; i++) weight_row(*m, outputs[i], out + i * m->inputs);
    return DONE;
}

// Run layers [first, last) on new rows x [batch][count][hidden], in place.
//
// entering: normed inputs of the first layer's attention, [rows][qkv inputs]; null takes its norm of x.
// positions: [rows], row of the tables for each row.
// seen: [count][named], 1 if a row sees one of the last `named` columns; null for causal.
// padding: [batch] columns on the left that no row sees, or null.
// captured: per layer, where to copy its input, or null.
// added: per layer, the products of an adapter, or null.
// Return DONE; or NO_ROOM if the rows do not fit the cache or the tables, or NO_MEMORY, and then nothing was done.
int forward(const Layer* layers, int64_t first, int64_t last, float* x, const float* entering, const Cache* cache,
            int64_t count, const int64_t* positions, const Tables* tables, const uint8_t* seen, int64_t named,
            const int64_t* padding, float* const* captured, const Added* added, int64_t threads) {
    const Layer& any = layers[first];
    const int64_t batch = cache->batch, rows = batch * count, hidden = any.hidden, dim = any.head_dim;
    for (int64_t i = 0; i < batch; i++) {
        if (cache->sequence(i) < 0 || cache->sequence(i) >= cache->sequences) return NO_ROOM;
        const int64_t end = cache->committed(i) + count;
        if (end < count || end > cache->capacity || named > end) return NO_ROOM;
        if (padding && (padding[i] < 0 || padding[i] > end)) return NO_ROOM;
    }
    for (int64_t r = 0; r < rows; r++)
        if (positions[r] < 0 || positions[r] >= tables->rows) return NO_ROOM;
    const int64_t heads = any.heads, kv_heads = any.kv_heads;
    const int64_t width = (heads + 2 * kv_heads) * dim, inner = any.down.inputs;
    const int64_t head_stride = cache->capacity * dim, sequence_stride = kv_heads * head_stride;
    const int64_t layer_stride = cache->sequences * sequence_stride, side = cache->layers * layer_stride;
    static thread_local std::vector<float> qkv_rows, attended_rows, fed_rows;
    static thread_local std::vector<Inputs> inputs;  // of each thread, or the first one of all
    std::vector<float>&qkv = qkv_rows, &attended = attended_rows, &fed = fed_rows;
    std::vector<Inputs>& prepared = inputs;
    const bool shared = rows > ALONE;
    const Added nothing = {};
    static thread_local Attention planned;
    Attention& attention = planned;
    const auto reserve = [&] {
        std::vector<Sequence> sequences;
        for (int64_t i = 0; i < batch; i++)
            sequences.push_back(
                {cache->sequence(i) * sequence_stride, padding ? padding[i] : 0, cache->committed(i) + count});
        attention.plan(std::move(sequences), seen, count, named, heads, kv_heads, dim, cache->size, head_stride,
                       threads);
        qkv.resize(rows * width);
        attended.resize(rows * heads * dim);
        fed.resize(rows * inner);
        if (prepared.size() < size_t(threads)) prepared.resize(threads);
        for (int64_t t = 0; t < (shared ? 1 : threads); t++)
            for (const Matrix* m : {&any.qkv, &any.out, &any.gate_up, &any.down}) prepared[t].reserve(*m, rows);
        return DONE;
    };
    if (guarded(reserve)) return NO_MEMORY;

#pragma omp parallel num_threads(threads)
    {
        const Tiles tiles;
        const Share own(rows);
        // Return all rows as a matrix needs them. Every thread writes its share of them, or for itself the few there are,
        // which takes less time than to wait for the others.
        const auto ready = [&](const float* x, const float* gain, float eps, const Matrix& m) -> const Inputs& {
            Inputs& q = prepared[shared ? 0 : omp_get_thread_num()];
            q.write(x, shared ? own.begin : 0, shared ? own.end : rows, gain, eps, m);
            if (shared) {
#pragma omp barrier
            }
            return q;
        };
        for (int64_t l = first; l < last; l++) {
            const Layer& layer = layers[l];
            const Matrix* after = l + 1 < last ? &layers[l + 1].qkv : nullptr;
            const Added& more = added ? added[l] : nothing;
            char* keys = cache->data + l * layer_stride * cache->size;
            char* values = keys + side * cache->size;
            if (captured && captured[l])
                std::memcpy(captured[l] + own.begin * hidden, x + own.begin * hidden,
                            (own.end - own.begin) * hidden * sizeof(float));
            const bool given = entering && l == first;
            const float *read = given ? entering : x, *gain = given ? nullptr : layer.input_norm;
            multiply(layer.qkv, ready(read, gain, layer.eps, layer.qkv), rows, Store{qkv.data(), width}, &layer.out);
#pragma omp barrier
            if (more.qkv.rank) {
                more.qkv.add(read, rows, layer.qkv, gain, layer.eps, qkv.data(), width);
#pragma omp barrier
            }
            const Share turned(rows * (heads + kv_heads));
            for (int64_t i = turned.begin; i < turned.end; i++) {  // rotary positions; keys and values to the cache
                const int64_t row = i / (heads + kv_heads), head = i % (heads + kv_heads), half = dim / 2;
                float* v = qkv.data() + row * width + head * dim;
                const float* gain = head < heads ? layer.q_norm : layer.k_norm;
                if (gain) normalise(v, gain, dim, layer.eps, v);
                for (int64_t d = 0; d < half; d += LANES) {
                    const float *c = tables->cos + positions[row] * dim + d, *s = tables->sin + positions[row] * dim + d;
                    const Floats a = load(v + d), b = load(v + d + half);
                    store(v + d, a * load(c) + b * load(s));
                    store(v + d + half, b * load(c + half) + a * load(s + half));
                }
                if (head < heads) continue;
                const int64_t entry = row / count, at = cache->committed(entry) + row % count;
                const int64_t offset =
                    cache->sequence(entry) * sequence_stride + (head - heads) * head_stride + at * dim;
                cache->write(v, keys + offset * cache->size, dim);
                cache->write(v + kv_heads * dim, values + offset * cache->size, dim);
            }
#pragma omp barrier
            const int64_t thread = omp_get_thread_num(), all = omp_get_num_threads();
            if (cache->floats())
                attention.attend(thread, all, qkv.data(), width, (float*)keys, (float*)values, attended.data());
            else
                attention.attend(thread, all, qkv.data(), width, (uint16_t*)keys, (uint16_t*)values, attended.data());
#pragma omp barrier
            if (!attention.whole) {
                if (cache->floats())
                    attention.merge_chunks<float>(thread, all, attended.data());
                else
                    attention.merge_chunks<uint16_t>(thread, all, attended.data());
#pragma omp barrier
            }
            multiply(layer.out, ready(attended.data(), nullptr, 0, layer.out), rows, Add{x, hidden},
                     layer.down.weight ? &layer.gate_up : after);
#pragma omp barrier
            if (more.out.rank) {
                more.out.add(attended.data(), rows, layer.out, nullptr, 0, x, hidden);
#pragma omp barrier
            }
            if (!layer.down.weight) continue;  // the layer has attention only
            multiply(layer.gate_up, ready(x, layer.post_norm, layer.eps, layer.gate_up), rows,
                     SwiGLU{fed.data(), inner}, &layer.down);
#pragma omp barrier
            multiply(layer.down, ready(fed.data(), nullptr, 0, layer.down), rows, Add{x, hidden}, after);
#pragma omp barrier
        }
    }
    return DONE;
}

// Sum all bytes, read in order by every thread in its own part, to measure how fast memory can be read.
int64_t read_all(const float* data, int64_t bytes, int64_t threads) {
    float total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
    {
        const Share share(bytes / 1024);
        Floats sums[4] = {};
        for (int64_t i = share.begin * 256; i < share.end * 256; i += 4 * LANES) {
            for (int j = 0; j < 4; j++) {
                __builtin_prefetch(data + i + 2048 + j * LANES);
                sums[j] += load(data + i + j * LANES);
            }
        }
        for (const Floats& part : sums) total += sum(part);
    }
    return int64_t(total);
}

// The `best` largest log-probabilities of every row over the outputs of two heads side by side, best first, and the
// entropy of the row in nats.
void most_probable(const float* a, int64_t a_width, int64_t a_stride, const float* b, int64_t b_width, int64_t rows,
                   int64_t best, int64_t* index, float* log_probability, float* entropy, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++)
        best_of({{a + r * a_stride, b + r * b_width}, {a_width, b ? b_width : 0}}, best, index + r * best,
                log_probability + r * best, entropy + r);
}

#include "target.h"

struct Fusion {  // from some of the target's states to a row of an EAGLE-3 head
    Matrix product;
    const float* const* norms;  // of each state, or null
    int64_t states;
    const float* joined;  // norm of all of them side by side, or null
};

struct Drafter {  // an EAGLE-3 head, or a language model if input_norm is null
    const Layer* layers;
    int64_t count;
    Embedding embedding;
    const float *input_norm, *hidden_norm, *norm;
    Fusion fusion;
    Tables tables;
    Matrix head;
    int64_t outputs;  // number of the head's first outputs that can be drafted
};

// Write the rows [count][hidden] that an EAGLE-3 head makes of the target's states [count][states * width].
int fuse(const Drafter* d, const float* states, int64_t count, float* out, int64_t threads) {
    const Fusion& f = d->fusion;
    const int64_t inputs = f.product.inputs, outputs = f.product.outputs, stride = f.product.columns() * COLUMNS;
    const float eps = d->layers->eps;
    std::vector<float> normed, fused;
    const auto reserve = [&] { return normed.resize(f.norms ? count * inputs : 0), fused.resize(count * stride), DONE; };
    if (guarded(reserve)) return NO_MEMORY;
    const int64_t width = f.norms ? inputs / f.states : 0;
    for (int64_t i = 0; f.norms && i < count * f.states; i++)
        normalise(states + i * width, f.norms[i % f.states], width, eps, normed.data() + i * width);
    const float* read = f.norms ? normed.data() : states;
    if (linear(&f.product, read, count, f.joined, eps, fused.data(), stride, threads)) return NO_MEMORY;
    for (int64_t r = 0; r < count; r++) std::copy_n(fused.data() + r * stride, outputs, out + r * outputs);
    return DONE;
}

// Run one forward of a drafter on new rows; the last layer's outputs are written to hidden [count][size]. A row of a
// language model is made from its token alone. A row of an EAGLE-3 head is a token and a state before it: row `from[r]`
// of read [available][size], or row r if `from` is null; or the fusion of row r of read, if `fuses`. Positions follow
// the committed ones if they are null. Then find the `width` most probable next tokens and the entropy of each of the
// last `last` rows, over the head's outputs and `extras` further rows. Return as `forward`.
int draft(const Drafter* d, const float* read, int64_t available, const int64_t* from, int64_t fuses, float* hidden,
          const int64_t* tokens, int64_t count, const int64_t* positions, const Cache* cache, const uint8_t* seen,
          int64_t named, int64_t last, const float* extra, int64_t extras, int64_t width, int64_t* index,
          float* log_probability, float* entropy, int64_t threads) {
    const int64_t size = d->layers->hidden;
    const float eps = d->layers->eps;
    if (!d->embedding.has(tokens, count)) return NO_ROOM;
    const int64_t stride_in = d->input_norm ? 2 * size : size;
    std::vector<float> entering;
    std::vector<int64_t> following;
    const auto reserve = [&] {
        entering.resize(d->input_norm ? count * stride_in : 0);
        if (positions) return DONE;
        following.resize(count);
        for (int64_t r = 0; r < count; r++) following[r] = cache->length + r;
        positions = following.data();
        return DONE;
    };
    if (guarded(reserve)) return NO_MEMORY;
    if (d->input_norm && fuses) {
        if (available < count) return NO_ROOM;
        if (fuse(d, read, count, hidden, threads)) return NO_MEMORY;
    }
    for (int64_t r = 0; r < count; r++) {
        float *row = d->input_norm ? entering.data() + r * stride_in : hidden + r * size, *state = hidden + r * size;
        d->embedding.read(tokens[r], size, row);
        if (!d->input_norm) continue;
        if (!fuses) {
            const int64_t source = from ? from[r] : r;
            if (source < 0 || source >= available) return NO_ROOM;
            std::copy_n(read + source * size, size, state);
        }
        normalise(row, d->input_norm, size, eps, row);
        normalise(state, d->hidden_norm, size, eps, row + size);
    }
    if (const int status = forward(d->layers, 0, d->count, hidden, d->input_norm ? entering.data() : nullptr, cache, count,
                                   positions, &d->tables, seen, named, nullptr, nullptr, nullptr, threads))
        return status;
    if (!last) return DONE;
    const float* final_rows = hidden + (count - last) * size;
    return propose(d->head, d->outputs, d->norm, eps, final_rows, last, extra, extras, width, index, log_probability,
                   entropy, threads);
}
}
#pragma GCC visibility pop
#pragma GCC visibility pop
