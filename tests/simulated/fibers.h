// The threads of one block as fibers of one host thread. They run in an order that a seed shuffles and meet at barriers
// and warp operations as on a device, so that a missing barrier, a barrier that not all threads reach or a read of what
// nobody wrote shows.
#pragma once
#include <setjmp.h>
#include <stdint.h>
#include <ucontext.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace simulated {

struct Random {  // splitmix64
  uint64_t state;
  uint64_t next() {
    uint64_t z = state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
  }
  size_t below(size_t n) { return size_t(next() % n); }
  template <class T>
  void shuffle(std::vector<T>& items) {
    for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[below(i)]);
  }
};

class Fibers {
 public:
  static constexpr int LANES = 32;
  enum Meeting { NONE, BLOCK, WARP, OR, EXCHANGE };  // EXCHANGE + i: with the lane whose bit i differs

  // Runs body(thread) for threads 0 .. count.
  template <class F>
  void run(int count, Random& random, const F& body) {
    body_ = [](const void* f, int thread) { (*static_cast<const F*>(f))(thread); };
    argument_ = &body;
    error_.clear();
    while (int(fibers_.size()) < count) fibers_.push_back(std::make_unique<Fiber>());
    waiting_.assign(size_t(count), NONE);
    values_.assign(size_t(count), 0);
    runnable_.clear();
    for (int i = 0; i < count; ++i) runnable_.push_back(i);
    left_ = count;
    while (left_ > 0) {
      if (runnable_.empty()) throw std::runtime_error("simulated: threads wait for each other");
      const size_t pick = random.below(runnable_.size());
      current_ = runnable_[pick];
      runnable_[pick] = runnable_.back();
      runnable_.pop_back();
      resume(*fibers_[size_t(current_)]);
      if (!error_.empty()) {
        fibers_.clear();  // their frames hold nothing to destroy
        throw std::runtime_error(error_);
      }
      if (waiting_[size_t(current_)] == NONE) {
        --left_;
        waiting_[size_t(current_)] = EXITED;
      } else {
        release(current_);
      }
    }
  }

  // From a thread: waits for all others of the block or warp; the result of a warp operation on `value`.
  uint64_t meet(int meeting, uint64_t value = 0) {
    const size_t thread = size_t(current_);
    waiting_[thread] = meeting;
    values_[thread] = value;
    yield(*fibers_[thread]);
    return values_[thread];
  }

 private:
  static constexpr int EXITED = -1;
  struct Fiber {
    static constexpr size_t SIZE = 256 << 10;
    std::unique_ptr<char[]> stack{new char[SIZE]};
    jmp_buf here;
    bool started = false;
  };

  // _setjmp and _longjmp between the stacks: swapcontext would make two system calls.
  __attribute__((noinline)) void resume(Fiber& fiber) {
    if (_setjmp(scheduler_)) return;
    if (fiber.started) _longjmp(fiber.here, 1);
    fiber.started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack.get();
    context.uc_stack.ss_size = Fiber::SIZE;
    context.uc_link = nullptr;
    const uintptr_t self = reinterpret_cast<uintptr_t>(this);
    makecontext(&context, reinterpret_cast<void (*)()>(&Fibers::enter), 2, unsigned(self), unsigned(self >> 32));
    setcontext(&context);
  }
  __attribute__((noinline)) void yield(Fiber& fiber) {
    if (!_setjmp(fiber.here)) _longjmp(scheduler_, 1);
  }
  static void enter(unsigned low, unsigned high) {
    reinterpret_cast<Fibers*>(uintptr_t(low) | uintptr_t(high) << 32)->loop();
  }
  __attribute__((noinline)) void loop() {  // one thread of each block, for ever
    while (true) {
      call();
      yield(*fibers_[size_t(current_)]);
    }
  }
  __attribute__((noinline)) void call() {
    try {
      body_(argument_, current_);
    } catch (const std::exception& e) {
      error_ = e.what();
    }
    waiting_[size_t(current_)] = NONE;
  }

  // Lets those go on for whom `thread` was the last to come.
  void release(int thread) {
    const int meeting = waiting_[size_t(thread)];
    const int first = meeting == BLOCK ? 0 : thread / LANES * LANES;
    const int end = meeting == BLOCK ? int(waiting_.size()) : first + LANES;
    for (int i = first; i < end; ++i) {
      const int other = waiting_[size_t(i)];
      if (other == EXITED) throw std::runtime_error("simulated: a thread left before a barrier of the others");
      if (other != meeting) return;
    }
    uint64_t all = 0;
    for (int i = first; i < end; ++i) all |= values_[size_t(i)];
    const int mask = meeting >= EXCHANGE ? 1 << (meeting - EXCHANGE) : 0;
    for (int i = first; i < end; ++i) {
      if (i & mask) std::swap(values_[size_t(i)], values_[size_t(i ^ mask)]);
    }
    for (int i = first; i < end; ++i) {
      if (meeting == OR) values_[size_t(i)] = all;
      waiting_[size_t(i)] = NONE;
      runnable_.push_back(i);
    }
  }

  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<int> waiting_, runnable_;
  std::vector<uint64_t> values_;
  void (*body_)(const void*, int) = nullptr;
  const void* argument_ = nullptr;
  std::string error_;
  jmp_buf scheduler_;
  int current_ = 0, left_ = 0;
};

}  // namespace simulated
