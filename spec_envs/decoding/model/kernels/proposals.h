// From a drafter's last hidden states to the most probable next tokens, over its head and the further rows of the text.
//
// Included by kernels.cpp.
#pragma once

// The logits of one row in two parts side by side, which are read 16 at a time.
struct Logits {
    const float* part[2];
    int64_t width[2];

    Floats at(int side, int64_t i) const {
        if (i + LANES <= width[side]) return load(part[side] + i);
        Floats v = all(-INFINITY);
        std::memcpy(&v, part[side] + i, (width[side] - i) * sizeof(float));
        return v;
    }
};

// The `best` largest log-probabilities of a row, best first, and the entropy of the row in nats.
inline void best_of(const Logits& logits, int64_t best, int64_t* index, float* log_probability, float* entropy) {
    std::vector<std::pair<float, int64_t>> top(best, {-INFINITY, -1});  // descending
    for (int side = 0; side < 2; side++)
        for (int64_t i = 0; i < logits.width[side]; i += LANES) {
            const Floats v = logits.at(side, i);
            if (!any(v > top.back().first)) continue;
            for (int lane = 0; lane < LANES; lane++) {
                if (!(v[lane] > top.back().first)) continue;
                int64_t place = best - 1;
                for (; place > 0 && v[lane] > top[place - 1].first; place--) top[place] = top[place - 1];
                top[place] = {v[lane], side * logits.width[0] + i + lane};
            }
        }
    Floats mass = {}, weighted = {};
    const Floats lowest = all(-100.0f);  // contributes nothing to the sum, and is finite
    for (int side = 0; side < 2; side++)
        for (int64_t i = 0; i < logits.width[side]; i += LANES) {
            Floats below = logits.at(side, i) - top[0].first;
            below = below > lowest ? below : lowest;
            const Floats share = exponential(below);
            mass += share;
            weighted += share * below;
        }
    const float total = std::log(sum(mass));
    *entropy = std::max(0.0f, total - sum(weighted) / sum(mass));
    for (int64_t i = 0; i < best; i++) {
        index[i] = top[i].second;
        log_probability[i] = std::min(0.0f, top[i].first - top[0].first - total);
    }
}

// Dot products of ROWS rows of x with weights [begin, end) of `size` floats, to out [ROWS][stride]. The sums of several
// pairs are made side by side, each in the order in which it is made alone.
template <int ROWS, int WEIGHTS>
inline void dots(const float* x, const float* weights, int64_t begin, int64_t end, int64_t size, float* out,
                 int64_t stride) {
    int64_t j = begin;
    for (; j + WEIGHTS <= end; j += WEIGHTS) {
        Floats dot[ROWS][WEIGHTS] = {};
        for (int64_t i = 0; i < size; i += LANES)
            for (int w = 0; w < WEIGHTS; w++) {
                const Floats weight = load(weights + (j + w) * size + i);
                for (int r = 0; r < ROWS; r++) dot[r][w] += load(x + r * size + i) * weight;
            }
        for (int r = 0; r < ROWS; r++)
            for (int w = 0; w < WEIGHTS; w++) out[r * stride + j + w] = sum(dot[r][w]);
    }
    if constexpr (WEIGHTS > 1) dots<ROWS, 1>(x, weights, j, end, size, out, stride);
}

// The most probable next tokens after hidden states x [rows][head.inputs], over the first `outputs` of the head and
// `extras` further rows of weights; see `draft`. Return NO_MEMORY, and then nothing was done, or DONE.
inline int propose(const Matrix& head, int64_t outputs, const float* gain, float eps, const float* x, int64_t rows,
                   const float* extra, int64_t extras, int64_t best, int64_t* index, float* log_probability,
                   float* entropy, int64_t threads) {
    static thread_local Inputs inputs;
    static thread_local std::vector<float> normed_rows, head_logits, extra_logits;
    Inputs& q = inputs;
    std::vector<float>&normed = normed_rows, &logits = head_logits, &others = extra_logits;
    const int64_t size = head.inputs, stride = (head.width() + COLUMNS - 1) / COLUMNS * COLUMNS;
    const auto reserve = [&] {
        q.reserve(head, rows);
        logits.resize(rows * stride);
        normed.resize(extras ? rows * size : 0), others.resize(rows * extras);
        return DONE;
    };
    if (guarded(reserve)) return NO_MEMORY;
#pragma omp parallel num_threads(threads)
    {
        const Tiles tiles;
        const Share own(rows), of_extras(extras);
        q.write(x, own.begin, own.end, gain, eps, head);
        for (int64_t r = own.begin; extras && r < own.end; r++)
            normalise(x + r * size, gain, size, eps, normed.data() + r * size);
#pragma omp barrier
        multiply(head, q, rows, Store{logits.data(), stride});
        const float* weights = extra;
        int64_t r = 0;
        for (; r + 4 <= rows; r += 4)
            dots<4, 4>(normed.data() + r * size, weights, of_extras.begin, of_extras.end, size,
                       others.data() + r * extras, extras);
        for (; r < rows; r++)
            dots<1, 8>(normed.data() + r * size, weights, of_extras.begin, of_extras.end, size,
                       others.data() + r * extras, extras);
#pragma omp barrier
        for (r = own.begin; r < own.end; r++)
            best_of({{logits.data() + r * stride, others.data() + r * extras}, {outputs, extras}}, best,
                    index + r * best, log_probability + r * best, entropy + r);
    }
    return DONE;
}
