// Matrix product for Hopper with an epilogue: activation, or addition to an fp32 stream. Operands are
// bf16, or e4m3 with a scale for each row of either; activations may leave as e4m3 again.
//
// A persistent block owns one tile of the product at a time. One warp loads blocks of both operands
// through tensor maps into a ring; two warp groups multiply, each its own rows by the columns that
// both share. Blocks of a cluster, one below the other, share the weight: each loads its part of it
// for all. The scheme is
// CUTLASS's persistent cooperative kernel (CUTLASS documentation, "Efficient GEMM in CUDA"), the
// instructions those of the PTX ISA (wgmma, mbarrier, cp.async.bulk.tensor).
//
// The launcher defines FP8, OUT_FP8, COLUMNS, STAGES, CLUSTER, EPILOGUE, OUT_BYTES, BUFFERS and the
// texts WGMMA_KIND, WGMMA_SUMS, WGMMA_OPERANDS, WGMMA_X, WGMMA_WEIGHT, WGMMA_USE, WGMMA_TAIL.

typedef unsigned int u32;
typedef unsigned long long u64;

#define STORE 0    // the product in bf16
#define GELU7 1    // min(u, 7) sigmoid(1.702 u)
#define SWIGLU7 2  // pairs of columns (glu, lin) to min(g, 7) sigmoid(1.702 g) (clamp(l) + 1)
#define ADD 3      // the product joins an fp32 matrix in place

constexpr u32 CONSUMERS = 2;
constexpr u32 WARP_GROUP = 128;
constexpr u32 DEPTH_BYTES = 128;  // of a row in a block of an operand: one swizzle
constexpr u32 DEPTH = FP8 ? DEPTH_BYTES : DEPTH_BYTES / 2;
constexpr u32 ROWS = CONSUMERS * 64;
constexpr u32 X_BYTES = ROWS * DEPTH_BYTES;
constexpr u32 WEIGHT_BYTES = COLUMNS * DEPTH_BYTES;
constexpr u32 STAGE_BYTES = X_BYTES + WEIGHT_BYTES;
constexpr u32 OUT_ELEMENT = EPILOGUE == ADD ? 4 : OUT_FP8 ? 1 : 2;
// |SwiGLU7| is at most 56 and |GELU7| at most 7, which these make 448, the end of e4m3.
constexpr float OUT_FACTOR = EPILOGUE == SWIGLU7 ? 8.0f : 64.0f;
constexpr u32 OUT_COLUMNS = EPILOGUE == SWIGLU7 ? COLUMNS / 2 : COLUMNS;
constexpr u32 BOX_COLUMNS = OUT_BYTES / OUT_ELEMENT;
constexpr u32 BOXES = OUT_COLUMNS / BOX_COLUMNS;
constexpr u32 BOX_BYTES = 64 * OUT_BYTES;
constexpr u32 SUMS_PER_BOX = COLUMNS / 2 / BOXES;  // registers of a thread that end in a box
constexpr u32 SWIZZLE = OUT_BYTES == 128 ? 0x70 : OUT_BYTES == 64 ? 0x30 : OUT_BYTES == 32 ? 0x10 : 0;
static_assert(BOXES * BOX_COLUMNS == OUT_COLUMNS, "boxes must divide the tile");

struct alignas(64) TensorMap {
    u64 words[16];
};

struct Maps {
    TensorMap x, weight, out[3];
};

struct Shape {
    const float *x_scale;       // of each row; null where all have one
    const float *weight_scale;  // of each row of the weight
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

__device__ __forceinline__ void store(const TensorMap *map, u32 from, int column, int row) {
    if (EPILOGUE == ADD) {
        asm volatile("cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.bulk_group"
                     " [%0, {%1, %2}], [%3];" ::"l"(map), "r"(column), "r"(row), "r"(from) : "memory");
    } else {
        asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group"
                     " [%0, {%1, %2}], [%3];" ::"l"(map), "r"(column), "r"(row), "r"(from) : "memory");
    }
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
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

// Two neighbouring columns of the product, rounded to bf16 as the plain model does.
__device__ __forceinline__ void rounded(float &low, float &high) {
    u32 pair = pack(low, high);
    low = __uint_as_float(pair << 16);
    high = __uint_as_float(pair & 0xffff0000u);
}

__device__ __forceinline__ Place place_of(int tile, const Shape &shape) {
    int span = shape.group * shape.column_tiles;
    int first = tile / span * shape.group;
    int height = min(shape.row_tiles - first, shape.group);
    int rest = tile % span;
    int row = first + rest % height;
    int run = (row >= shape.last_tile[0]) + (row >= shape.last_tile[1]);
    int local = run == 0 ? row : row - shape.last_tile[run - 1];
    u32 rank = cluster_rank();
    return {run, static_cast<int>((local * CLUSTER + rank) * ROWS), rest / height * COLUMNS};
}

// Scales of two neighbouring rows of the weight; zeros past its end.
__device__ __forceinline__ float2 weight_scales(const Shape &shape, int run, int column) {
    if (column >= shape.weight_rows) return make_float2(0.0f, 0.0f);
    const float *scales = shape.weight_scale + run * shape.weight_rows + column;
    if (shape.weight_rows % 2 == 0) return *reinterpret_cast<const float2 *>(scales);
    // Of an odd number of rows the second run's do not start at a multiple of 8 bytes.
    return make_float2(scales[0], column + 1 < shape.weight_rows ? scales[1] : 0.0f);
}

__device__ __forceinline__ float x_scale(const Shape &shape, int run, int row) {
    if (shape.x_scale == nullptr) return shape.x_scale_of_all;
    return row < shape.rows[run] ? shape.x_scale[shape.first_row[run] + row] : 0.0f;
}

// One consumer's 64 rows: registers to shared memory, and from there to memory, a box at a time.
__device__ __forceinline__ void finish(
    float (&sums)[COLUMNS / 2], const TensorMap *map, u32 buffers, u32 &used, const Shape &shape,
    const Place &place, int row, u32 consumer) {
    u32 thread = threadIdx.x % WARP_GROUP;
    u32 line = thread / 32 * 16 + thread % 32 / 4;  // and the line 8 below
    u32 lane = thread % 4;
    int column = EPILOGUE == SWIGLU7 ? place.column / 2 : place.column;
    float row_scales[2];
    if (FP8) {
        row_scales[0] = x_scale(shape, place.run, row + line);
        row_scales[1] = x_scale(shape, place.run, row + line + 8);
    }
#pragma unroll
    for (u32 box = 0; box < BOXES; ++box) {
        u32 buffer = buffers + used % BUFFERS * BOX_BYTES;
        ++used;
        if (thread == 0) asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(BUFFERS - 1) : "memory");
        asm volatile("bar.sync %0, 128;" ::"r"(consumer + 1) : "memory");
#pragma unroll
        for (u32 i = 0; i < SUMS_PER_BOX / 2; ++i) {
            u32 at = box * SUMS_PER_BOX + 2 * i;  // sums come as (line, line, line + 8, line + 8)
            float low = sums[at], high = sums[at + 1];
            u32 y = line + (i % 2) * 8;
            if (FP8) {
                float2 scales = weight_scales(shape, place.run, place.column + at / 4 * 8 + lane * 2);
                low *= scales.x * row_scales[i % 2];
                high *= scales.y * row_scales[i % 2];
            }
            if (EPILOGUE == ADD) {
                u32 at_byte = y * OUT_BYTES + (i / 2 * 8 + lane * 2) * 4;
                at_byte ^= at_byte >> 3 & SWIZZLE;
                asm volatile("st.shared.v2.f32 [%0], {%1, %2};"
                             ::"r"(buffer + at_byte), "f"(low), "f"(high) : "memory");
            } else if (EPILOGUE == SWIGLU7) {
                rounded(low, high);
                high = at_most(at_least(high, -7.0f), 7.0f) + 1.0f;
                float result = gated(at_most(low, 7.0f)) * high;
                u32 at_byte = y * OUT_BYTES + (i / 2 * 4 + lane) * OUT_ELEMENT;
                at_byte ^= at_byte >> 3 & SWIZZLE;
                if (OUT_FP8) {
                    asm volatile("st.shared.b8 [%0], %1;"
                                 ::"r"(buffer + at_byte), "r"(pack_e4m3(result * OUT_FACTOR, 0.0f))
                                 : "memory");
                } else {
                    asm volatile("st.shared.b16 [%0], %1;"
                                 ::"r"(buffer + at_byte),
                                   "h"(static_cast<unsigned short>(pack(result, 0.0f))) : "memory");
                }
            } else {
                if (EPILOGUE == GELU7) {
                    rounded(low, high);
                    low = gated(at_most(low, 7.0f));
                    high = gated(at_most(high, 7.0f));
                }
                u32 at_byte = y * OUT_BYTES + (i / 2 * 8 + lane * 2) * OUT_ELEMENT;
                at_byte ^= at_byte >> 3 & SWIZZLE;
                if (OUT_FP8) {
                    u32 pair = pack_e4m3(low * OUT_FACTOR, high * OUT_FACTOR);
                    asm volatile("st.shared.b16 [%0], %1;"
                                 ::"r"(buffer + at_byte), "h"(static_cast<unsigned short>(pair))
                                 : "memory");
                } else {
                    asm volatile("st.shared.b32 [%0], %1;"
                                 ::"r"(buffer + at_byte), "r"(pack(low, high)) : "memory");
                }
            }
        }
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        asm volatile("bar.sync %0, 128;" ::"r"(consumer + 1) : "memory");
        if (thread == 0) store(map, buffer, column + box * BOX_COLUMNS, row);
    }
}

extern "C" __global__ void __launch_bounds__(3 * WARP_GROUP, 1)
#if CLUSTER > 1
__cluster_dims__(CLUSTER, 1, 1)
#endif
matmul(const __grid_constant__ Maps maps, const __grid_constant__ Shape shape) {
    extern __shared__ char memory[];
    u32 base = (shared_address(memory) + 1023) & ~1023u;
    u32 buffers = base + STAGES * STAGE_BYTES;
    u32 full = buffers + CONSUMERS * BUFFERS * BOX_BYTES;
    u32 empty = full + STAGES * 8;
    u32 rank = cluster_rank();
    if (threadIdx.x == 0) {
        for (u32 slot = 0; slot < STAGES; ++slot) {
            barrier_init(full + slot * 8, 1);
            barrier_init(empty + slot * 8, CONSUMERS * CLUSTER);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    cluster_sync();

    int tiles = shape.row_tiles * shape.column_tiles;
    int stride = gridDim.x / CLUSTER;
    u32 count = 0;
    if (threadIdx.x < WARP_GROUP) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
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
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        u32 consumer = threadIdx.x / WARP_GROUP - 1;
        u32 thread = threadIdx.x % WARP_GROUP;
        u32 used = 0;
        float sums[COLUMNS / 2];
        buffers += consumer * BUFFERS * BOX_BYTES;
        for (int tile = blockIdx.x / CLUSTER; tile < tiles; tile += stride) {
            Place place = place_of(tile, shape);
            int row = place.row + static_cast<int>(consumer * 64);
            if (row >= shape.rows[place.run]) {  // nothing but padding: spare the power
                for (int block = 0; block < shape.blocks; ++block, ++count) {
                    u32 slot = count % STAGES;
                    barrier_wait(full + slot * 8, count / STAGES % 2);
                    if (thread < CLUSTER) barrier_arrive(empty + slot * 8, thread);
                }
                continue;
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
            finish(sums, &maps.out[place.run], buffers, used, shape, place, row, consumer);
        }
        if (thread == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
    }
    cluster_sync();  // no block leaves while another may still signal to it
}
