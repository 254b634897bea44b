// What rows of a projection have for the heads of every process, q and k normed, rotated and
// rounded to e4m3 on the way (reference.qkv_fp8), v and gates as they are. See peers.py;
// peer_signal.cu comes before.
//
// Each warp takes what one row has for one process, four heads at a time. Eight lanes have a head,
// each of them eight dims and the eight that they turn with, so that no dim is moved. Sums and
// products are in the order of attention/qkv_fp8.py, and so are their bits: one GPU and several make
// the same of a projection.

typedef unsigned short u16;

constexpr int DIM = 128;        // of a head
constexpr int PIECE = 8;        // dims that a lane loads at once
constexpr int LANES = DIM / (2 * PIECE);    // of a head
constexpr int TOGETHER = 32 / LANES;        // heads of a warp at a time
constexpr int EXPERTS = 3;      // most sets of weights

struct Qkv {
    const u16 *qkv;             // rows [Q | K | V | gate] in bf16
    const float *q_weight, *k_weight;  // [experts, DIM], zero-centred
    const float *rope;          // [rows of all processes, 2 angles], sines first
    float *qk_scale;            // of q times k
    char *target[MOST];         // of each process: [rows of all, heads, DIM] of q in e4m3
    Signal signal;
    long long stride;           // values between rows of qkv
    long long k_at, rest_at;    // bytes from `target` to k in e4m3, and to [V | gate] in bf16
    int rest_stride;            // values between rows of [V | gate]
    int rows;                   // of each process
    int audio_start, text_start;  // among the rows of all processes
    int experts;                // 1 or 3 sets of weights
    int angles;                 // a multiple of 2 PIECE
    int heads, kv_heads;        // of each process
    float eps, of_gain, smallest;  // of_gain: scale of a normed head whose gain is 1
};

// Of a lane: dims and those that they turn with; sines and cosines; gains, times a scale.
struct Dims {
    float x[PIECE];
};

__device__ __forceinline__ Dims wide(uint4 packed) {
    Dims d;
    const u32 words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        d.x[2 * i] = __uint_as_float(words[i] << 16);
        d.x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
    return d;
}

__device__ __forceinline__ Dims load(const float *from) {
    float4 a = *reinterpret_cast<const float4 *>(from);
    float4 b = *reinterpret_cast<const float4 *>(from + 4);
    return {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
}

__device__ __forceinline__ u32 narrow(const float *four) {
    u32 packed;
    asm("{\n.reg .b16 low, high;\n"
        "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
        "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
        "mov.b32 %0, {low, high};\n}"
        : "=r"(packed) : "f"(four[0]), "f"(four[1]), "f"(four[2]), "f"(four[3]));
    return packed;
}

// The scale of all normed heads, whose dims the largest gain bounds; of the whole warp.
__device__ __forceinline__ float scale_of(const Qkv &e, const float *weight, int lane) {
    float largest = 0;
    for (int at = lane; at < e.experts * DIM; at += 32) largest = fmaxf(largest, fabsf(weight[at] + 1));
    for (int step = 16; step; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
    return fmaxf(__fmul_rn(largest, e.of_gain), e.smallest);
}

// Where a lane's dims are in a head, and how they turn. What passes through has the sine 0: its
// first half goes with its second.
struct Turn {
    Dims sin, cos;
    int first, second;
};

__device__ __forceinline__ Turn turn_of(const Qkv &e, long long row, int lane) {
    int piece = lane % LANES, turning = e.angles / PIECE;
    bool turns = piece < turning;
    Turn t;
    t.first = (piece + (turns ? 0 : turning)) * PIECE;
    t.second = (piece + (turns ? turning : LANES)) * PIECE;
    const float *table = e.rope + row * 2 * e.angles + piece * PIECE;
    if (turns) {
        t.sin = load(table), t.cos = load(table + e.angles);
    } else {
#pragma unroll
        for (int i = 0; i < PIECE; ++i) t.sin.x[i] = 0, t.cos.x[i] = 1;
    }
    return t;
}

// `count` heads of a row. gains: [DIM], times the inverse of the scale.
__device__ __forceinline__ void send(
    const u16 *from, const float *gains, float eps, const Turn &turn, char *to, int count, int lane) {
    for (int start = 0; start < count; start += TOGETHER) {
        int head = start + lane / LANES;
        uint4 packed[2] = {make_uint4(0, 0, 0, 0), make_uint4(0, 0, 0, 0)};
        if (head < count) {
            packed[0] = *reinterpret_cast<const uint4 *>(from + head * DIM + turn.first);
            packed[1] = *reinterpret_cast<const uint4 *>(from + head * DIM + turn.second);
        }
        Dims a = wide(packed[0]), b = wide(packed[1]);
        float sum;
#pragma unroll
        for (int i = 0; i < PIECE; ++i) {
            float both = __fmaf_rn(a.x[i], a.x[i], __fmul_rn(b.x[i], b.x[i]));
            sum = i ? __fadd_rn(both, sum) : both;
        }
#pragma unroll
        for (int step = LANES / 2; step; step /= 2) {
            sum = __fadd_rn(sum, __shfl_xor_sync(~0u, sum, step));
        }
        float scale = rsqrtf(__fadd_rn(__fmul_rn(sum, 1.0f / DIM), eps));
        Dims gain = load(gains + turn.first);
#pragma unroll
        for (int i = 0; i < PIECE; ++i) a.x[i] = __fmul_rn(__fmul_rn(scale, a.x[i]), gain.x[i]);
        gain = load(gains + turn.second);
#pragma unroll
        for (int i = 0; i < PIECE; ++i) {
            float x = a.x[i], y = __fmul_rn(__fmul_rn(scale, b.x[i]), gain.x[i]);
            a.x[i] = __fmaf_rn(x, turn.cos.x[i], -__fmul_rn(y, turn.sin.x[i]));
            b.x[i] = __fmaf_rn(y, turn.cos.x[i], __fmul_rn(x, turn.sin.x[i]));
        }
        // Of two lanes side by side one stores the first dims of both, the other the second ones.
        uint2 mine = make_uint2(narrow(a.x), narrow(a.x + 4));
        uint2 other = make_uint2(narrow(b.x), narrow(b.x + 4));
        bool is_odd = lane % 2;
        uint2 given = is_odd ? mine : other;
        given.x = __shfl_xor_sync(~0u, given.x, 1), given.y = __shfl_xor_sync(~0u, given.y, 1);
        uint4 out = is_odd ? make_uint4(given.x, given.y, other.x, other.y)
                           : make_uint4(mine.x, mine.y, given.x, given.y);
        int place = is_odd ? turn.second - PIECE : turn.first;
        if (head < count) *reinterpret_cast<uint4 *>(to + head * DIM + place) = out;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_EACH)
exchange_qkv(const __grid_constant__ Qkv e) {
    const Signal &s = e.signal;
    int warp = (blockIdx.x * THREADS + threadIdx.x) / 32, lane = threadIdx.x % 32;
    __shared__ float gains[2][EXPERTS * DIM];
    float q_scale = scale_of(e, e.q_weight, lane), k_scale = scale_of(e, e.k_weight, lane);
    if (warp == 0 && lane == 0) *e.qk_scale = __fmul_rn(q_scale, k_scale);
    for (int at = threadIdx.x; at < e.experts * DIM; at += THREADS) {
        gains[0][at] = __fmul_rn(e.q_weight[at] + 1, __fdiv_rn(1, q_scale));
        gains[1][at] = __fmul_rn(e.k_weight[at] + 1, __fdiv_rn(1, k_scale));
    }
    __syncthreads();
    for (int item = warp; item < e.rows * s.ranks; item += gridDim.x * (THREADS / 32)) {
        int row = item / s.ranks, peer = peer_of(s, item);
        long long of_all = static_cast<long long>(s.rank) * e.rows + row;
        long long place = s.is_alone ? static_cast<long long>(peer) * e.rows + row : of_all;
        char *base = e.target[s.is_alone ? s.rank : peer];
        const u16 *q = e.qkv + row * e.stride + static_cast<long long>(peer) * e.heads * DIM;
        const u16 *k = e.qkv + row * e.stride + (s.ranks * e.heads + peer * e.kv_heads) * DIM;
        const u16 *v = k + s.ranks * e.kv_heads * DIM;
        const u16 *gate =
            e.qkv + row * e.stride + s.ranks * (e.heads + 2 * e.kv_heads) * DIM + peer * e.heads;
        u16 *rest = reinterpret_cast<u16 *>(base + e.rest_at) + place * e.rest_stride;
        int values = e.kv_heads * DIM;
        for (int at = lane * 8; at < values; at += 32 * 8) {
            *reinterpret_cast<uint4 *>(rest + at) = *reinterpret_cast<const uint4 *>(v + at);
        }
        for (int at = lane; at < e.rest_stride - values; at += 32) {
            rest[values + at] = at < e.heads ? gate[at] : u16(0);
        }
        int expert = e.experts == 1 ? 0 : (of_all >= e.audio_start) + (of_all >= e.text_start);
        Turn turn = turn_of(e, of_all, lane);
        send(q, gains[0] + expert * DIM, e.eps, turn, base + place * e.heads * DIM, e.heads, lane);
        send(k, gains[1] + expert * DIM, e.eps, turn, base + e.k_at + place * e.kv_heads * DIM,
             e.kv_heads, lane);
    }
    meet(s);
}
