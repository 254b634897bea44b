// What every kernel that writes to the memory of the other GPUs ends with: it tells every process
// by a number in its memory, and waits for theirs. Once the kernel ends, all that was sent is there.
//
// Every exchange is told by a number one higher, so no flag is ever cleared. A word on the host ends
// the waiting for a process that has ended.

typedef unsigned int u32;

constexpr int MOST = 8;         // processes
constexpr int THREADS = 512;
constexpr int BLOCKS_EACH = 2;  // on a multiprocessor

struct Signal {
    u32 *flags[MOST];           // of each process: how far every process is
    u32 *state;                 // exchanges so far, and blocks that have written
    const u32 *is_given_up;     // on the host
    int rank, ranks;
    int is_alone;               // write to this process's memory only, and tell nobody
};

__device__ __forceinline__ void tell(u32 *flag, u32 number) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(number) : "memory");
}

__device__ __forceinline__ u32 read(const u32 *flag) {
    u32 number;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(number) : "l"(flag) : "memory");
    return number;
}

// Which process the `at`-th is that this one writes to: it begins with another, ends with itself.
__device__ __forceinline__ int peer_of(const Signal &s, int at) {
    return (s.rank + 1 + at % s.ranks) % s.ranks;
}

// Called by every thread once it has written. The last block to come here tells and waits.
__device__ __forceinline__ void meet(const Signal &s) {
    if (s.is_alone) return;
    __shared__ bool is_last;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence_system();
        is_last = atomicAdd(s.state + 1, 1) == gridDim.x - 1;
    }
    __syncthreads();
    if (!is_last) return;
    u32 number = s.state[0] + 1;
    if (threadIdx.x < s.ranks) {
        __threadfence_system();
        tell(s.flags[threadIdx.x] + s.rank, number);
        const u32 *other = s.flags[s.rank] + threadIdx.x;
        for (int asked = 1; static_cast<int>(read(other) - number) < 0; ++asked) {
            if (asked % 256 == 0 && read(s.is_given_up) != 0) break;
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        s.state[0] = number;
        s.state[1] = 0;
    }
}
