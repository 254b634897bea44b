// Matrix product for Hopper with an epilogue: activation, or addition to an fp32 stream. Operands are
// bf16, or e4m3 with a scale for each row of either; activations may leave as e4m3 again.
//
// A persistent block owns one tile of the product at a time. One warp loads blocks of both operands
// through tensor maps into a ring; two warp groups multiply, each its own rows by the columns that
// both share. They put the product, scaled and in bf16, into panels in shared memory and go on to the
// next tile, while the other three warps of the first group make the epilogue of it: the tensor cores
// wait neither for the activation nor for memory. Blocks of a cluster, one below the other, share the
// weight: each loads its part of it for all. The scheme is
// CUTLASS's persistent cooperative kernel (CUTLASS documentation, "Efficient GEMM in CUDA"), the
// instructions those of the PTX ISA (wgmma, mbarrier, cp.async.bulk.tensor, stmatrix).
//
// The launcher defines FP8, OUT_FP8, COLUMNS, STAGES, RING_PANELS, CLUSTER, EPILOGUE and the texts
// WGMMA_KIND, WGMMA_SUMS, WGMMA_OPERANDS, WGMMA_X, WGMMA_WEIGHT, WGMMA_USE, WGMMA_TAIL.

typedef unsigned int u32;
typedef unsigned long long u64;

#define STORE 0    // the product in bf16
#define GELU7 1    // min(u, 7) sigmoid(1.702 u)
#define SWIGLU7 2  // pairs of columns (glu, lin) to min(g, 7) sigmoid(1.702 g) (clamp(l) + 1)
#define ADD 3      // the product, in bf16, joins an fp32 matrix in place

constexpr u32 CONSUMERS = 2;
constexpr u32 WARP_GROUP = 128;
constexpr u32 FINISHERS = WARP_GROUP - 32;  // threads beside the warp that loads
constexpr u32 DEPTH_BYTES = 128;  // of a row in a block of an operand: one swizzle
constexpr u32 DEPTH = FP8 ? DEPTH_BYTES : DEPTH_BYTES / 2;
constexpr u32 ROWS = CONSUMERS * 64;
constexpr u32 X_BYTES = ROWS * DEPTH_BYTES;
constexpr u32 WEIGHT_BYTES = COLUMNS * DEPTH_BYTES;
constexpr u32 STAGE_BYTES = X_BYTES + WEIGHT_BYTES;
// |SwiGLU7| is at most 56 and |GELU7| at most 7, which these make 448, the end of e4m3.
constexpr float OUT_FACTOR = EPILOGUE == SWIGLU7 ? 8.0f : 64.0f;
// The product waits for its epilogue in panels of 64 columns, 64 rows of 128 bytes, in a ring.
constexpr u32 PANEL_COLUMNS = 64;
constexpr u32 PANEL_BYTES = 64 * 128;
constexpr u32 PANELS = COLUMNS / PANEL_COLUMNS;  // of one warp group's part of a tile
static_assert(COLUMNS % PANEL_COLUMNS == 0, "panels must divide the tile");

struct alignas(64) TensorMap {
    u64 words[16];
};

struct Maps {
    TensorMap x, weight, out[3];  // and of each run's rows of the output, in panels
};

struct Shape {
    const float *x_scale;       // of each row; null where all have one
    const float *weight_scale;  // of each row of the weight
    void *out;
    long long out_stride;  // in elements
    int out_columns;
    float x_scale_of_all;
    int blocks;          // of DEPTH along the sum
    int column_tiles;    // in clusters
    int row_tiles;       // in clusters
    int group;           // row tiles that go through all columns together
    int weight_rows;     // of one run's weight
    int first_row[3];    // of each run
    int rows[3];         // of each run
    int last_tile[3];    // row tiles up to and with each run
};

struct Place {
    int run, row, column;  // row within the run, column of the product
};

__device__ __forceinline__ u32 shared_address(const void *pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ u32 cluster_rank() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return CLUSTER == 1 ? 0 : rank;
}

__device__ __forceinline__ void cluster_sync() {
    if (CLUSTER > 1) {
        asm volatile("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;"
                     ::: "memory");
    } else {
        __syncthreads();
    }
}

__device__ __forceinline__ void barrier_init(u32 barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n .reg .pred done;\n"
        "again:\n mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        " @done bra finished;\n bra again;\nfinished:\n}" ::"r"(barrier), "r"(parity) : "memory");
}

// Arrive at the barrier at this offset in one block of the cluster. Not with the cluster's scope,
// which costs a fence of the whole GPU: the tensor cores alone have read what this gives free.
__device__ __forceinline__ void barrier_arrive(u32 barrier, u32 rank) {
    asm volatile(
        "{\n .reg .b32 remote;\n mapa.shared::cluster.u32 remote, %0, %1;\n"
        " mbarrier.arrive.shared::cluster.b64 _, [remote];\n}"
        ::"r"(barrier), "r"(rank) : "memory");
}

__device__ __forceinline__ void barrier_arrive_here(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void load(const TensorMap *map, u32 into, u32 barrier, int k, int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%2, %3}], [%4];"
        ::"r"(into), "l"(map), "r"(k), "r"(row), "r"(barrier) : "memory");
}

// The same box to the same place in every block of the cluster.
__device__ __forceinline__ void load_shared(
    const TensorMap *map, u32 into, u32 barrier, int k, int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;"
        ::"r"(into), "l"(map), "r"(k), "r"(row), "r"(barrier),
          "h"(static_cast<unsigned short>((1 << CLUSTER) - 1)) : "memory");
}

// Make what this thread has written to shared memory visible to copies from there.
__device__ __forceinline__ void publish() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// A panel to memory; returns once it has been read.
__device__ __forceinline__ void copy_panel(const TensorMap *map, u32 panel, int column, int row) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];"
                 ::"l"(map), "r"(column), "r"(row), "r"(panel) : "memory");
    asm volatile("cp.async.bulk.commit_group;\n cp.async.bulk.wait_group.read 0;" ::: "memory");
}

__device__ __forceinline__ void group_sync(u32 group) {
    asm volatile("bar.sync %0, 128;" ::"r"(group) : "memory");
}

// Rows of 128 bytes in the 128-byte swizzle, eight rows apart by 1024 bytes (PTX ISA, wgmma's matrix
// descriptor).
__device__ __forceinline__ u64 descriptor(u32 address) {
    return static_cast<u64>((address & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

__device__ __forceinline__ void multiply(float (&sums)[COLUMNS / 2], u64 x, u64 weight, int add) {
    asm volatile("{\n .reg .pred use;\n setp.ne.b32 use, " WGMMA_USE ", 0;\n"
                 " wgmma.mma_async.sync.aligned." WGMMA_KIND " {" WGMMA_SUMS "}, " WGMMA_X
                 ", " WGMMA_WEIGHT ", use, " WGMMA_TAIL ";\n}"
                 : WGMMA_OPERANDS : "l"(x), "l"(weight), "r"(add));
}

template <int PENDING>
__device__ __forceinline__ void multiply_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ u32 pack(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ __forceinline__ u32 pack_e4m3(float low, float high) {
    unsigned short pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
}

// At most `limit`, and at least; NaN stays NaN, which fminf and fmaxf would make a number.
__device__ __forceinline__ float at_most(float x, float limit) {
    float result;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(x), "f"(limit));
    return result;
}

__device__ __forceinline__ float at_least(float x, float limit) {
    float result;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(x), "f"(limit));
    return result;
}

__device__ __forceinline__ float gated(float x) {  // x sigmoid(1.702 x)
    float power, inverse;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * (-1.702f * 1.4426950408889634f)));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(power + 1.0f));
    return x * inverse;
}

__device__ __forceinline__ Place place_of(int tile, const Shape &shape) {
    int span = shape.group * shape.column_tiles;
    int first = tile / span * shape.group;
    int height = min(shape.row_tiles - first, shape.group);
    int rest = tile % span;
    int row = first + rest % height;
    // From the last row up: what the other operand's writer wrote last is still in the L2 cache, and
    // what is written last here is what the next norm reads first.
    if (EPILOGUE == ADD) row = shape.row_tiles - 1 - row;
    int run = (row >= shape.last_tile[0]) + (row >= shape.last_tile[1]);
    int local = run == 0 ? row : row - shape.last_tile[run - 1];
    u32 rank = cluster_rank();
    return {run, static_cast<int>((local * CLUSTER + rank) * ROWS), rest / height * COLUMNS};
}

// Bring the scales of a tile's columns to shared memory while it is multiplied; zeros past the end.
__device__ __forceinline__ void fetch_scales(const Shape &shape, const Place &place, u32 scales) {
    const float *from = shape.weight_scale + place.run * shape.weight_rows;
    for (u32 i = threadIdx.x % WARP_GROUP; i < COLUMNS; i += WARP_GROUP) {
        int column = place.column + i;
        bool has = column < shape.weight_rows;
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
                     ::"r"(scales + i * 4), "l"(from + (has ? column : 0)), "r"(has ? 4 : 0)
                     : "memory");
    }
}

__device__ __forceinline__ float x_scale(const Shape &shape, int run, int row) {
    if (shape.x_scale == nullptr) return shape.x_scale_of_all;
    return row < shape.rows[run] ? shape.x_scale[shape.first_row[run] + row] : 0.0f;
}

__device__ __forceinline__ float2 load_pair(u32 address) {
    float2 pair;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(pair.x), "=f"(pair.y) : "r"(address));
    return pair;
}

__device__ __forceinline__ uint4 load_words(u32 address) {
    uint4 words;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w) : "r"(address));
    return words;
}

// One panel of a warp group's product, scaled and in bf16.
template <u32 PANEL>
__device__ __forceinline__ void put(
    const float (&sums)[COLUMNS / 2], u32 panel, u32 scales, const float (&row_scales)[2]) {
    u32 thread = threadIdx.x % WARP_GROUP, lane = thread % 32;
    // Each lane names a row of one of four matrices of 8 by 8: two below each other, two beside.
    u32 row = thread / 32 * 16 + lane % 16, chunk = lane / 16;
#pragma unroll
    for (u32 i = 0; i < PANEL_COLUMNS / 16; ++i) {
        u32 words[4];
#pragma unroll
        for (u32 beside = 0; beside < 2; ++beside) {
            // In eights; sums come as (line, line, line + 8, line + 8).
            u32 column = PANEL * PANEL_COLUMNS / 8 + 2 * i + beside;
            float2 scale = make_float2(1.0f, 1.0f);
            if (FP8) scale = load_pair(scales + column * 32 + lane % 4 * 8);
#pragma unroll
            for (u32 below = 0; below < 2; ++below) {
                float low = sums[column * 4 + below * 2], high = sums[column * 4 + below * 2 + 1];
                if (FP8) {
                    low *= scale.x * row_scales[below];
                    high *= scale.y * row_scales[below];
                }
                words[beside * 2 + below] = pack(low, high);
            }
        }
        u32 place = panel + row * 128 + ((2 * i + chunk) ^ row % 8) * 16;
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                     ::"r"(place), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
                     : "memory");
    }
}

__device__ __forceinline__ float low_of(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_of(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

__device__ __forceinline__ float swiglu7(u32 pair) {  // of (glu, lin)
    float linear = at_most(at_least(high_of(pair), -7.0f), 7.0f) + 1.0f;
    return gated(at_most(low_of(pair), 7.0f)) * linear;
}

__device__ __forceinline__ float gelu7(float x) { return gated(at_most(x, 7.0f)); }

__device__ __forceinline__ u32 join(u32 low, u32 high) { return low | high << 16; }

// Where the epilogue of eight neighbouring columns of the product goes.
constexpr u32 OUT_COLUMNS = EPILOGUE == SWIGLU7 ? 4 : 8;
constexpr u32 OUT_ELEMENT = EPILOGUE == ADD ? 4 : OUT_FP8 ? 1 : 2;
constexpr u32 OUT_WORDS = OUT_COLUMNS * OUT_ELEMENT / 4;

// Eight neighbouring columns of the product through the epilogue. `words` comes with what is in
// memory where that is added to.
__device__ __forceinline__ void convert(const uint4 &x, u32 (&words)[OUT_WORDS]) {
    const u32 pairs[4] = {x.x, x.y, x.z, x.w};
    float y[8];
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        if (EPILOGUE == SWIGLU7) {
            y[i] = swiglu7(pairs[i]);
        } else {
            y[2 * i] = low_of(pairs[i]);
            y[2 * i + 1] = high_of(pairs[i]);
        }
    }
#pragma unroll
    for (u32 i = 0; i < OUT_WORDS; ++i) {
        if (EPILOGUE == ADD) {
            words[i] = __float_as_uint(__uint_as_float(words[i]) + y[i % 8]);
        } else {
            float four[4];
#pragma unroll
            for (u32 j = 0; j < 4; ++j) {
                float value = y[(OUT_FP8 ? 4 * i + j : 2 * i + j % 2) % 8];
                four[j] = EPILOGUE == GELU7 ? gelu7(value) : value;
            }
            words[i] = OUT_FP8 ? join(pack_e4m3(four[0] * OUT_FACTOR, four[1] * OUT_FACTOR),
                                      pack_e4m3(four[2] * OUT_FACTOR, four[3] * OUT_FACTOR))
                               : pack(four[0], four[1]);
        }
    }
}

__device__ __forceinline__ void read_memory(const char *from, u32 (&words)[OUT_WORDS], u32 bytes) {
    if (bytes == OUT_WORDS * 4) {
#pragma unroll
        for (u32 i = 0; i < OUT_WORDS; i += 4) {
            asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(words[i]), "=r"(words[i + 1]), "=r"(words[i + 2]),
                           "=r"(words[i + 3]) : "l"(from + i * 4));
        }
    } else {
#pragma unroll
        for (u32 i = 0; i < OUT_WORDS; ++i) {
            if (i * 4 < bytes) words[i] = *reinterpret_cast<const u32 *>(from + i * 4);
        }
    }
}

// The first `bytes` of the words to memory, at once where these are all.
__device__ __forceinline__ void write_memory(char *to, const u32 (&words)[OUT_WORDS], u32 bytes) {
    if (bytes == OUT_WORDS * 4) {
        if (OUT_WORDS == 1) {
            *reinterpret_cast<u32 *>(to) = words[0];
        } else if (OUT_WORDS == 2) {
            *reinterpret_cast<uint2 *>(to) = make_uint2(words[0], words[1]);
        } else {
#pragma unroll
            for (u32 i = 0; i + 3 < OUT_WORDS; i += 4) {
                *reinterpret_cast<uint4 *>(to + i * 4) =
                    make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]);
            }
        }
    } else {
#pragma unroll
        for (u32 i = 0; i < OUT_WORDS * 4; ++i) {
            if (i < bytes) to[i] = static_cast<char>(words[i / 4] >> i % 4 * 8);
        }
    }
}

// The epilogue of one panel by FINISHERS threads, to memory. row: of the run; column: of the
// product.
__device__ __forceinline__ void finish(
    const Shape &shape, u32 panel, u32 full, u32 empty, u32 parity, int run, int row, int column) {
    constexpr u32 STEP = FINISHERS / 8;  // lines, of eight units of 16 bytes
    constexpr u32 UNITS = (64 + STEP - 1) / STEP;  // of each thread
    u32 thread = threadIdx.x - 32;
    u32 line = thread / 8, chunk = thread % 8;
    int out_column = (column + static_cast<int>(chunk) * 8) / static_cast<int>(8 / OUT_COLUMNS);
    int left = (shape.out_columns - out_column) * static_cast<int>(OUT_ELEMENT);
    u32 bytes = min(max(left, 0), static_cast<int>(OUT_WORDS * 4));
    long long first = (shape.first_row[run] + row + line) * shape.out_stride + out_column;
    char *to = static_cast<char *>(shape.out) + first * OUT_ELEMENT;
    long long step = STEP * shape.out_stride * OUT_ELEMENT;
    int rows = min(shape.rows[run] - row, 64) - static_cast<int>(line);  // from this thread's on
    u32 words[UNITS][OUT_WORDS];
    if (EPILOGUE == ADD) {
#pragma unroll
        for (u32 i = 0; i < UNITS; ++i) {
            if (static_cast<int>(i * STEP) < rows) read_memory(to + i * step, words[i], bytes);
        }
    }
    barrier_wait(full, parity);
    auto unit = [&](u32 i) {
        u32 y = min(line + i * STEP, 63u);
        return load_words(panel + y * 128 + (chunk ^ y % 8) * 16);
    };
    auto write = [&](u32 i, const uint4 &x) {
        convert(x, words[i]);
        if (static_cast<int>(i * STEP) < rows) write_memory(to + i * step, words[i], bytes);
    };
    if (EPILOGUE == ADD) {  // the registers hold what is added to
#pragma unroll
        for (u32 i = 0; i < UNITS; ++i) write(i, unit(i));
        barrier_arrive_here(empty);
    } else {
        uint4 units[UNITS];
#pragma unroll
        for (u32 i = 0; i < UNITS; ++i) units[i] = unit(i);
        barrier_arrive_here(empty);
#pragma unroll
        for (u32 i = 0; i < UNITS; ++i) write(i, units[i]);
    }
}

// What `put` leaves, panel by panel, each as soon as there is room for it.
template <u32 PANEL>
__device__ __forceinline__ void put_all(
    const float (&sums)[COLUMNS / 2], u32 panels, u32 full, u32 empty, u32 first, u32 scales,
    const float (&row_scales)[2]) {
    u32 number = first + PANEL, slot = number % RING_PANELS;
    barrier_wait(empty + slot * 8, number / RING_PANELS % 2 ^ 1);
    put<PANEL>(sums, panels + slot * PANEL_BYTES, scales, row_scales);
    if (EPILOGUE == STORE) publish();
    barrier_arrive_here(full + slot * 8);
    if constexpr (PANEL + 1 < PANELS) {
        put_all<PANEL + 1>(sums, panels, full, empty, first, scales, row_scales);
    }
}

extern "C" __global__ void __launch_bounds__(3 * WARP_GROUP, 1)
#if CLUSTER > 1
__cluster_dims__(CLUSTER, 1, 1)
#endif
matmul(const __grid_constant__ Maps maps, const __grid_constant__ Shape shape) {
    extern __shared__ __align__(1024) char memory[];  // as the swizzle asks
    u32 base = shared_address(memory);
    u32 panels = base + STAGES * STAGE_BYTES;
    u32 scales = panels + RING_PANELS * PANEL_BYTES;  // of each consumer's columns
    u32 full = scales + (FP8 ? CONSUMERS * COLUMNS * 4 : 0);
    u32 empty = full + STAGES * 8;
    u32 panel_full = empty + STAGES * 8;
    u32 panel_empty = panel_full + RING_PANELS * 8;
    u32 turn = panel_empty + RING_PANELS * 8;  // of each consumer to put its panels
    u32 rank = cluster_rank();
    if (threadIdx.x == 0) {
        for (u32 slot = 0; slot < STAGES; ++slot) {
            barrier_init(full + slot * 8, 1);
            barrier_init(empty + slot * 8, CONSUMERS * CLUSTER);
        }
        for (u32 slot = 0; slot < RING_PANELS; ++slot) {
            barrier_init(panel_full + slot * 8, WARP_GROUP);
            barrier_init(panel_empty + slot * 8, EPILOGUE == STORE ? 1 : FINISHERS);
        }
        for (u32 consumer = 0; consumer < CONSUMERS; ++consumer) barrier_init(turn + consumer * 8, 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    cluster_sync();

    int tiles = shape.row_tiles * shape.column_tiles;
    int stride = gridDim.x / CLUSTER;
    u32 count = 0;
    if (threadIdx.x < WARP_GROUP) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 104;");
        if (threadIdx.x == 0) {
            for (int tile = blockIdx.x / CLUSTER; tile < tiles; tile += stride) {
                Place place = place_of(tile, shape);
                int x_row = shape.first_row[place.run] + place.row;
                int weight_row = shape.weight_rows * place.run + place.column;
                for (int block = 0; block < shape.blocks; ++block, ++count) {
                    u32 slot = count % STAGES, ready = full + slot * 8;
                    u32 x = base + slot * STAGE_BYTES, weight = x + X_BYTES;
                    int k = block * DEPTH;
                    barrier_wait(empty + slot * 8, count / STAGES % 2 ^ 1);
                    barrier_expect(ready, STAGE_BYTES);
                    load(&maps.x, x, ready, k, x_row);
                    if (CLUSTER > 1) {
                        constexpr int part = COLUMNS / CLUSTER;
                        load_shared(&maps.weight, weight + rank * part * DEPTH_BYTES, ready, k,
                                    weight_row + rank * part);
                    } else {
                        load(&maps.weight, weight, ready, k, weight_row);
                    }
                }
            }
        }
        // A panel that is stored as it is needs one thread.
        bool finishes = EPILOGUE == STORE ? threadIdx.x == 32 : threadIdx.x >= 32;
        if (finishes) for (int tile = blockIdx.x / CLUSTER; tile < tiles; tile += stride) {
            Place place = place_of(tile, shape);
            for (int row = place.row; row < place.row + static_cast<int>(ROWS); row += 64) {
                if (row >= shape.rows[place.run]) break;
                for (u32 panel = 0; panel < PANELS; ++panel, ++count) {
                    u32 slot = count % RING_PANELS;
                    u32 from = panels + slot * PANEL_BYTES, parity = count / RING_PANELS % 2;
                    int column = place.column + static_cast<int>(panel * PANEL_COLUMNS);
                    if (EPILOGUE == STORE) {
                        barrier_wait(panel_full + slot * 8, parity);
                        copy_panel(&maps.out[place.run], from, column, row);
                        barrier_arrive_here(panel_empty + slot * 8);
                    } else {
                        finish(shape, from, panel_full + slot * 8, panel_empty + slot * 8, parity,
                               place.run, row, column);
                    }
                }
            }
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 200;");
        u32 consumer = threadIdx.x / WARP_GROUP - 1;
        u32 thread = threadIdx.x % WARP_GROUP;
        u32 line = thread / 32 * 16 + thread % 32 / 4;  // and the line 8 below
        u32 put_panels = 0;  // by both consumers
        // They put in the order in which panels are finished. A barrier tells two phases apart: one
        // that came here while the other's panels of the tile before it wait for room would take
        // the room that was given two rounds ago for its own.
        u32 mine = turn + consumer * 8, other = turn + (consumer ^ 1) * 8, turn_parity = consumer ^ 1;
        float sums[COLUMNS / 2];
        scales += consumer * COLUMNS * 4;
        // One stays this far behind the other, so that it multiplies while the other puts its sums.
        constexpr u32 behind = STAGES - 1;
        if (consumer == 1 && shape.blocks > static_cast<int>(behind)) barrier_wait(full + behind * 8, 0);
        for (int tile = blockIdx.x / CLUSTER; tile < tiles; tile += stride) {
            Place place = place_of(tile, shape);
            int row = place.row + static_cast<int>(consumer * 64);
            u32 first_panel = put_panels + consumer * PANELS;
            put_panels += PANELS * ((place.row < shape.rows[place.run])
                                    + (place.row + 64 < shape.rows[place.run]));
            if (row >= shape.rows[place.run]) {  // nothing but padding: spare the power
                for (int block = 0; block < shape.blocks; ++block, ++count) {
                    u32 slot = count % STAGES;
                    barrier_wait(full + slot * 8, count / STAGES % 2);
                    if (thread < CLUSTER) barrier_arrive(empty + slot * 8, thread);
                }
                if (thread == 0) {
                    barrier_wait(mine, turn_parity);
                    barrier_arrive_here(other);
                }
                turn_parity ^= 1;
                continue;
            }
            float row_scales[2];
            if (FP8) {
                row_scales[0] = x_scale(shape, place.run, row + line);
                row_scales[1] = x_scale(shape, place.run, row + line + 8);
                fetch_scales(shape, place, scales);
            }
            for (int block = 0; block < shape.blocks; ++block, ++count) {
                u32 slot = count % STAGES;
                u32 x = base + slot * STAGE_BYTES + consumer * 64 * DEPTH_BYTES;
                u32 weight = base + slot * STAGE_BYTES + X_BYTES;
                barrier_wait(full + slot * 8, count / STAGES % 2);
                asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
                for (u32 step = 0; step < DEPTH_BYTES / 32; ++step) {
                    multiply(sums, descriptor(x + step * 32), descriptor(weight + step * 32),
                             block > 0 || step > 0);
                }
                asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
                multiply_wait<1>();
                if (block > 0 && thread < CLUSTER) {
                    barrier_arrive(empty + (count + STAGES - 1) % STAGES * 8, thread);
                }
            }
            multiply_wait<0>();
            if (thread < CLUSTER) barrier_arrive(empty + (count + STAGES - 1) % STAGES * 8, thread);
            if (FP8) asm volatile("cp.async.wait_all;" ::: "memory");
            if (thread == 0) barrier_wait(mine, turn_parity);
            turn_parity ^= 1;
            group_sync(consumer + 1);  // all scales are there
            put_all<0>(sums, panels, panel_full, panel_empty, first_panel, scales, row_scales);
            group_sync(consumer + 1);  // nobody brings the next tile's scales before all have read
            if (thread == 0) barrier_arrive_here(other);
        }
    }
    if (EPILOGUE == STORE && threadIdx.x == 32) {
        asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
    }
    cluster_sync();  // no block leaves while another may still signal to it
}
