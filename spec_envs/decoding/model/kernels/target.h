// A whole reading of new rows of a text: from their tokens to the hidden states and the choices after them.
//
// Included by kernels.cpp after the structures of a model and `forward`.
#pragma once

constexpr int64_t BFLOAT16 = 0, OUTPUTS = 1;  // kinds of an embedding

struct Embedding {  // [vocabulary][width] in bfloat16; or a Matrix whose outputs are the vocabulary
    const void* rows;
    int64_t kind, vocabulary;

    bool has(const int64_t* tokens, int64_t count) const {
        return std::all_of(tokens, tokens + count, [&](int64_t token) { return token >= 0 && token < vocabulary; });
    }

    // Write the row of a token in floats.
    void read(int64_t token, int64_t width, float* out) const {
        if (kind == OUTPUTS) return weight_row(*static_cast<const Matrix*>(rows), token, out);
        const uint16_t* row = static_cast<const uint16_t*>(rows) + token * width;
        for (int64_t i = 0; i < width; i++) out[i] = widened(row[i]);
    }
};

struct Text {  // a model, the cache of one text, and memory for up to `room` new rows
    const Layer* layers;
    int64_t count;
    Embedding embedding;
    Tables tables;
    const float* norm;
    Matrix head;
    Cache cache;
    int64_t room;
    const int64_t* tokens;   // [room]
    const int64_t* parents;  // [room], of the rows after the first one: which of those rows it continues, or -1
    const int64_t* kept;     // [room], which rows `keep` commits, ascending
    float* hidden;           // [room][width]
    float* const* captured;  // per layer, memory [room][width] for its input, or null
    const float* const* states;  // [wanted], those of the memories above that make up the features
    int64_t wanted;
    int64_t* choices;  // [room], the most probable tokens after the last rows
};

// Read `rows` new tokens, of which the first continues the text. The others are a tree if `tree`, and then a row sees
// the first one, the rows that it continues, and itself; otherwise each continues the one before. Choose the tokens
// after the last `chosen` rows. Return as `forward`.
int read_rows(const Text* t, int64_t rows, int64_t tree, int64_t chosen, const Added* added, int64_t threads) {
    const int64_t width = t->layers->hidden, length = t->cache.length;
    if (rows < 1 || rows > t->room || chosen < 0 || chosen > rows) return NO_ROOM;
    if (!t->embedding.has(t->tokens, rows)) return NO_ROOM;
    std::vector<int64_t> positions;
    std::vector<uint8_t> seen;
    const auto place = [&] {
        positions.resize(rows);
        seen.assign(tree ? rows * rows : 0, 0);
        for (int64_t r = 0; r < rows; r++) {
            const int64_t parent = tree && r ? t->parents[r - 1] + 1 : r - 1;
            if (parent < 0 && r) return NO_ROOM;
            if (parent >= r) return NO_ROOM;
            positions[r] = r ? positions[parent] + 1 : length;
            if (!tree) continue;
            if (r) std::copy_n(seen.data() + parent * rows, r, seen.data() + r * rows);
            seen[r * rows + r] = 1;
        }
        return DONE;
    };
    if (const int status = guarded(place)) return status;
    for (int64_t r = 0; r < rows; r++) t->embedding.read(t->tokens[r], width, t->hidden + r * width);
    if (const int status = forward(t->layers, 0, t->count, t->hidden, nullptr, &t->cache, rows, positions.data(),
                                   &t->tables, tree ? seen.data() : nullptr, tree ? rows : 0, nullptr, t->captured,
                                   added, threads))
        return status;
    if (!chosen) return DONE;
    return linear_argmax(&t->head, t->hidden + (rows - chosen) * width, chosen, t->norm, t->layers->eps, t->choices,
                         threads);
}

// Move the keys and values of the first `count` rows in `kept` to the end of the text, and write their captured states
// side by side to features [count][wanted][width]. Return NO_ROOM for rows that were not read.
int keep_rows(const Text* t, int64_t count, float* features) {
    const Cache& cache = t->cache;
    const int64_t width = t->layers->hidden, dim = t->layers->head_dim;
    for (int64_t i = 0; i < count; i++)
        if (t->kept[i] < (i ? t->kept[i - 1] + 1 : 0) || t->kept[i] >= t->room) return NO_ROOM;
    if (count && cache.length + t->kept[count - 1] >= cache.capacity) return NO_ROOM;
    int64_t first = 0;  // rows before it are where they belong
    while (first < count && t->kept[first] == first) first++;
    const int64_t heads = 2 * cache.layers * t->layers->kv_heads;
    for (int64_t head = 0; first < count && head < heads; head++) {
        const int64_t row = dim * cache.size;
        char* end = cache.data + (head * cache.capacity + cache.length) * row;
        for (int64_t i = first; i < count; i++) std::copy_n(end + t->kept[i] * row, row, end + i * row);
    }
    for (int64_t i = 0; i < count; i++)
        for (int64_t state = 0; state < t->wanted; state++)
            std::copy_n(t->states[state] + t->kept[i] * width, width, features + (i * t->wanted + state) * width);
    return DONE;
}
