// Rows for heads and back, by stores to the memory of the other GPUs: copy, signal and wait in one
// launch. See peers.py; peer_signal.cu comes before. Each warp copies what one row has for one
// process.
//
// The launcher defines PACK, VECTOR and ELEMENT.

#if VECTOR == 16
typedef uint4 Vector;
#elif VECTOR == 8
typedef uint2 Vector;
#elif VECTOR == 4
typedef u32 Vector;
#else
typedef unsigned short Vector;
#endif
#if ELEMENT == 2
typedef unsigned short Element;
#else
typedef u32 Element;
#endif

constexpr int AHEAD = 8;    // loads of a thread before it stores

struct Exchange {
    const char *source;
    char *target[MOST];         // of each process
    Signal signal;
    long long source_stride;    // bytes between rows
    long long target_stride;
    int rows;                   // of each process
    int q, kv, gate;            // bytes of a row for each process
};

__device__ __forceinline__ void copy(const char *from, char *to, int bytes, int lane) {
    for (int start = lane * VECTOR; start < bytes; start += 32 * VECTOR * AHEAD) {
        Vector held[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            int at = start + i * 32 * VECTOR;
            if (at < bytes) held[i] = *reinterpret_cast<const Vector *>(from + at);
        }
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            int at = start + i * 32 * VECTOR;
            if (at < bytes) *reinterpret_cast<Vector *>(to + at) = held[i];
        }
    }
}

__device__ __forceinline__ void copy_row(const Exchange &e, int row, int peer, int lane) {
    const Signal &s = e.signal;
    long long block = s.is_alone ? peer : s.rank;
    char *base = e.target[s.is_alone ? s.rank : peer];
    if (!PACK) {
        const char *from = e.source + (static_cast<long long>(peer) * e.rows + row) * e.source_stride;
        copy(from, base + row * e.target_stride + block * e.q, e.q, lane);
        return;
    }
    const char *from = e.source + row * e.source_stride;
    char *to = base + (block * e.rows + row) * e.target_stride;
    copy(from + peer * e.q, to, e.q, lane);
    from += s.ranks * e.q;
    copy(from + peer * e.kv, to + e.q, e.kv, lane);
    from += s.ranks * e.kv;
    copy(from + peer * e.kv, to + e.q + e.kv, e.kv, lane);
    from += s.ranks * e.kv + peer * e.gate;
    to += e.q + 2 * e.kv;
    int padded = static_cast<int>(e.target_stride) - e.q - 2 * e.kv;
    for (int at = lane * ELEMENT; at < padded; at += 32 * ELEMENT) {
        Element value = at < e.gate ? *reinterpret_cast<const Element *>(from + at) : 0;
        *reinterpret_cast<Element *>(to + at) = value;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_EACH)
exchange(const __grid_constant__ Exchange e) {
    int warp = (blockIdx.x * THREADS + threadIdx.x) / 32, lane = threadIdx.x % 32;
    int ranks = e.signal.ranks;
    for (int item = warp; item < e.rows * ranks; item += gridDim.x * (THREADS / 32)) {
        copy_row(e, item / ranks, peer_of(e.signal, item), lane);
    }
    meet(e.signal);
}
