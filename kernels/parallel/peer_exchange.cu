// Rows for heads and back, by stores to the memory of the other GPUs: copy, signal and wait in one
// launch. See peers.py.
//
// Each warp copies what one row has for one process. The last block to have copied tells every
// process by a number in its memory, and waits for theirs: once the kernel ends, all rows are there.
// Every exchange is told by a number one higher, so no flag is ever cleared. A word on the host ends
// the waiting for a process that has ended.
//
// The launcher defines PACK, VECTOR and ELEMENT.

typedef unsigned int u32;

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

constexpr int MOST = 8;     // processes
constexpr int THREADS = 512;
constexpr int BLOCKS_EACH = 2;  // on a multiprocessor
constexpr int AHEAD = 8;    // loads of a thread before it stores

struct Exchange {
    const char *source;
    char *target[MOST];         // of each process
    u32 *flags[MOST];           // of each process: how far every process is
    u32 *state;                 // exchanges so far, and blocks that have copied
    const u32 *is_given_up;     // on the host
    long long source_stride;    // bytes between rows
    long long target_stride;
    int rows;                   // of each process
    int rank, ranks;
    int is_alone;               // copy to this process's memory only, and tell nobody
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
    long long block = e.is_alone ? peer : e.rank;
    char *base = e.target[e.is_alone ? e.rank : peer];
    if (!PACK) {
        const char *from = e.source + (static_cast<long long>(peer) * e.rows + row) * e.source_stride;
        copy(from, base + row * e.target_stride + block * e.q, e.q, lane);
        return;
    }
    const char *from = e.source + row * e.source_stride;
    char *to = base + (block * e.rows + row) * e.target_stride;
    copy(from + peer * e.q, to, e.q, lane);
    from += e.ranks * e.q;
    copy(from + peer * e.kv, to + e.q, e.kv, lane);
    from += e.ranks * e.kv;
    copy(from + peer * e.kv, to + e.q + e.kv, e.kv, lane);
    from += e.ranks * e.kv + peer * e.gate;
    to += e.q + 2 * e.kv;
    int padded = static_cast<int>(e.target_stride) - e.q - 2 * e.kv;
    for (int at = lane * ELEMENT; at < padded; at += 32 * ELEMENT) {
        Element value = at < e.gate ? *reinterpret_cast<const Element *>(from + at) : 0;
        *reinterpret_cast<Element *>(to + at) = value;
    }
}

__device__ __forceinline__ void tell(u32 *flag, u32 number) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(number) : "memory");
}

__device__ __forceinline__ u32 read(const u32 *flag) {
    u32 number;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(number) : "l"(flag) : "memory");
    return number;
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_EACH)
exchange(const __grid_constant__ Exchange e) {
    int warp = (blockIdx.x * THREADS + threadIdx.x) / 32, lane = threadIdx.x % 32;
    for (int item = warp; item < e.rows * e.ranks; item += gridDim.x * (THREADS / 32)) {
        // Every process begins with another, and ends with itself.
        copy_row(e, item / e.ranks, (e.rank + 1 + item % e.ranks) % e.ranks, lane);
    }
    if (e.is_alone) return;
    __shared__ bool is_last;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence_system();
        is_last = atomicAdd(e.state + 1, 1) == gridDim.x - 1;
    }
    __syncthreads();
    if (!is_last) return;
    u32 number = e.state[0] + 1;
    if (threadIdx.x < e.ranks) {
        __threadfence_system();
        tell(e.flags[threadIdx.x] + e.rank, number);
        const u32 *other = e.flags[e.rank] + threadIdx.x;
        for (int asked = 1; static_cast<int>(read(other) - number) < 0; ++asked) {
            if (asked % 256 == 0 && read(e.is_given_up) != 0) break;
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        e.state[0] = number;
        e.state[1] = 0;
    }
}
