// The functions that kernels call: launches, barriers, exchanges within a warp, asynchronous copies. Always
// built without sanitizers, so that these observe the kernels but not the emulation. The exceptions are
// memcpy and memset for a thread's own accesses: the sanitizers intercept and check those.
#include "emulation.h"

#include <algorithm>
#include <chrono>
#include <memory>
#include <numeric>

#include "scheduler.h"

namespace emulation {

Indices indices;
unsigned lane;

// -------------------------------------------------------------------------------------------- launches
namespace {

constexpr unsigned char kPoison = 0xFF;
constexpr uint64_t kPoisonWord = ~uint64_t{0};

void poison(const SharedVariable& v) { std::memset(v.start, kPoison, v.bytes); }

bool is_poison(const SharedVariable& v) {
  return std::all_of(v.start, v.start + v.bytes, [](unsigned char b) { return b == kPoison; });
}

void poison_all_shared_variables() {
  for (const SharedVariable& v : r.symbols.shared_variables) poison(v);
}

void read_symbols_once() {
  static std::once_flag once;
  std::call_once(once, [] {
    r.symbols = read_symbols(&r);
    poison_all_shared_variables();
  });
}

/// The shared variables of a launch. Between launches all shared variables of the library are poison, so that
/// only those need poison before a block that its kernel can have written: its own, and those of functions
/// that are inlined into kernels. Which others it writes is looked up after the first launch of a kernel.
class SharedVariables {
 public:
  explicit SharedVariables(const void* kernel)
      : name_(name_of(kernel)), first_(r.launched.insert(kernel).second) {
    collect();
  }
  SharedVariables(const SharedVariables&) = delete;
  SharedVariables& operator=(const SharedVariables&) = delete;
  ~SharedVariables() {
    if (ended_) {
      poison_those();
    } else {
      poison_all_shared_variables();
    }
  }

  void poison_those() const {
    for (const SharedVariable* v : reached_) poison(*v);
  }

  /// After the last block. A kernel launched with dynamic shared memory must itself declare all static shared
  /// memory that it uses: the launch limit does not count what other functions declare (static_shared_bytes).
  void end(bool dynamic) {
    if (first_) find_others();
    for (const SharedVariable* v : reached_) {
      if (!dynamic || v->is_of(name_) || is_poison(*v)) continue;
      throw std::runtime_error("emulation: " + name_ + " has dynamic shared memory and uses " + v->name +
                               ", which no launch limit counts: declare it in the kernel");
    }
    ended_ = true;
  }

 private:
  void collect() {
    reached_.clear();
    for (const SharedVariable& v : r.symbols.shared_variables)
      if (!v.of_one || v.is_of(name_)) reached_.push_back(&v);
  }
  /// Of functions that were not inlined.
  void find_others() {
    for (SharedVariable& v : r.symbols.shared_variables)
      if (v.of_one && !v.is_of(name_) && !is_poison(v)) v.of_one = false;
    collect();
  }

  const std::string name_;
  const bool first_;
  bool ended_ = false;
  std::vector<const SharedVariable*> reached_;
};

void read_environment() {
  const char* text = std::getenv("MAML_CUDA_EMULATION_SCHEDULE");
  const std::string value = text == nullptr ? "forward" : text;
  const bool seeded = value.starts_with("shuffled:");
  const std::string seed = seeded ? value.substr(std::strlen("shuffled:")) : "0";
  if (value == "forward") return set_schedule(Schedule::forward);
  if (value == "backward") return set_schedule(Schedule::backward);
  if ((seeded || value == "shuffled") && !seed.empty() && seed.size() < 10 &&
      seed.find_first_not_of("0123456789") == std::string::npos)
    return set_schedule(Schedule::shuffled, static_cast<unsigned>(std::stoul(seed)));
  throw std::runtime_error("MAML_CUDA_EMULATION_SCHEDULE is forward, backward or shuffled[:seed], not " +
                           value);
}

void set_block_size(dim3 size) {
  indices.block_size = size;
  r.count = size_t{size.x} * size.y * size.z;
  if (r.threads.size() < r.count) r.threads.resize(r.count);
  size_t i = 0;
  for (unsigned z = 0; z < size.z; ++z)
    for (unsigned y = 0; y < size.y; ++y)
      for (unsigned x = 0; x < size.x; ++x) r.threads[i++].index = {x, y, z};
}

}  // namespace

namespace {

void run_blocks(const Launch& launch, void (*kernel)(const void*), const void* arguments) {
  const dim3 grid = launch.grid;
  const size_t shared_bytes = launch.shared_bytes;
  const std::lock_guard lock(r.mutex);
  if (!r.schedule_known) read_environment();
  read_symbols_once();

  // A separate allocation, so that AddressSanitizer knows where it ends.
  void* dynamic = nullptr;
  if (shared_bytes > 0 && posix_memalign(&dynamic, 128, shared_bytes) != 0) throw std::bad_alloc();
  const std::unique_ptr<void, void (*)(void*)> owner(dynamic, std::free);
  r.dynamic = static_cast<unsigned char*>(dynamic);
  r.dynamic_bytes = shared_bytes;
  r.early = launch.early;
  r.kernel = kernel;
  r.arguments = arguments;
  r.host.adopt_host();
  set_block_size(launch.block);
  indices.grid_size = grid;

  SharedVariables shared(launch.kernel);
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  std::vector<uint64_t> shuffled(r.schedule == Schedule::shuffled ? blocks : 0);
  std::iota(shuffled.begin(), shuffled.end(), uint64_t{0});
  for (uint64_t i = 0; i < blocks; ++i) {
    uint64_t b = r.schedule == Schedule::backward ? blocks - 1 - i : i;
    if (r.schedule == Schedule::shuffled) {
      std::swap(shuffled[i], shuffled[i + random_below(blocks - i)]);
      b = shuffled[i];
    }
    indices.block = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                     static_cast<unsigned>(b / grid.x / grid.y)};
    shared.poison_those();
    if (r.dynamic_bytes > 0) std::memset(r.dynamic, kPoison, r.dynamic_bytes);
    run_block();
  }
  shared.end(shared_bytes > 0);
}

}  // namespace

void run(const Launch& launch, void (*kernel)(const void*), const void* arguments) {
  const auto begin = std::chrono::steady_clock::now();
  if (host.log_mode != LogMode::only) run_blocks(launch, kernel, arguments);
  if (host.log_mode == LogMode::off) return;
  const std::lock_guard lock(host.mutex);
  host.log.push_back(launch);
  host.log.back().seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

std::string name_of(const void* function) {
  read_symbols_once();
  const auto found = r.symbols.functions.find(function);
  return found == r.symbols.functions.end() ? "" : found->second;
}

size_t static_shared_bytes(const void* kernel) {
  const std::string name = name_of(kernel);
  size_t bytes = 0;
  for (const SharedVariable& v : r.symbols.shared_variables) bytes += v.is_of(name) ? v.bytes : 0;
  return bytes;
}

void set_schedule(Schedule schedule, unsigned seed) {
  r.schedule = schedule;
  r.schedule_known = true;
  r.random = (uint64_t{seed} + 1) * 0x9E3779B97F4A7C15u;
}

int64_t switches() { return r.switches; }
void* dynamic_shared() { return r.dynamic; }
void fail(const char* what) { give_up(what); }

// -------------------------------------------------------------------------------------- block barriers
void block_barrier(const std::source_location& location) {
  Thread& me = running();
  me.place = Place(location);
  if (r.at_block == 0) r.block_place = me.place;
  if (!(r.block_place == me.place))
    give_up("divergent barrier: one waits at __syncthreads (" + me.place.words() + ") while " +
            std::to_string(r.at_block) + " of " + std::to_string(r.count) + " threads wait at another (" +
            r.block_place.words() + ")");
  me.state = State::at_block_barrier;
  release(&me.arrived);
  if (++r.at_block == r.count) {
    r.at_block = 0;
    if (under_tsan())
      for (size_t i = 0; i < r.count; ++i) acquire(&r.threads[i].arrived);
    release(&me.opened);
    for_each_in_order(0, r.count, [&](size_t i) { wake(i, &me.opened); });
  }
  wait_for_turn();
}

bool block_vote(bool predicate, const std::source_location& place) {
  running().vote = predicate;
  block_barrier(place);
  const bool any = std::any_of(r.threads.begin(), r.threads.begin() + static_cast<std::ptrdiff_t>(r.count),
                               [](const Thread& t) { return t.vote; });
  block_barrier(place);  // until then, votes stay
  return any;
}

void wait_for_previous_kernels() { running().waited = true; }

// ------------------------------------------------------------------------------------- barriers of a warp
namespace {

/// A copy that the sanitizers do not see.
void copy_unseen(void* to, const void* from, size_t bytes) {
  auto* t = static_cast<unsigned char*>(to);
  const auto* f = static_cast<const unsigned char*>(from);
  const auto copy_by = [&]<class Chunk>(Chunk) {
    for (; bytes >= sizeof(Chunk); bytes -= sizeof(Chunk), t += sizeof(Chunk), f += sizeof(Chunk)) {
      *reinterpret_cast<Chunk*>(t) = *reinterpret_cast<const Chunk*>(f);
      asm volatile("" : : : "memory");  // keeps the compiler from calling memcpy
    }
  };
  struct [[gnu::packed, gnu::may_alias]] Wide {
    uint64_t words[8];
  };
  struct [[gnu::packed, gnu::may_alias]] Word {
    uint64_t word;
  };
  copy_by(Wide{});
  copy_by(Word{});
  copy_by(static_cast<unsigned char>(0));
}

/// Called when all lanes of the mask have arrived: gives each its result and lets it continue. In CUDA a
/// shuffle does not order memory accesses, so the race detector is told about __syncwarp only.
void open_warp(size_t warp, unsigned mask) {
  Thread* lanes = &r.threads[warp * 32];
  const Thread& me = running();
  const size_t bytes = me.exchange.bytes;
  char* opened = me.exchange.orders_memory ? &running().opened : nullptr;
  const auto for_each_lane = [&](const auto& f) {
    for_each_in_order(0, 32, [&](size_t l) {
      if (mask >> l & 1) f(lanes[l], l);
    });
  };
  for_each_lane([&](Thread& t, size_t) {
    if (t.exchange.bytes != bytes || std::strcmp(t.exchange.name, me.exchange.name) != 0)
      give_up("divergent warp: " + std::string(me.exchange.name) + " (" + me.place.words() + ") meets " +
              t.exchange.name + " (" + t.place.words() + ")");
    if (opened != nullptr) acquire(&t.arrived);
  });
  if (opened != nullptr) release(opened);
  if (bytes > 0) {
    unsigned char* gathered = r.gathered;
    for (size_t l = 0; l < 32; ++l)
      copy_unseen(gathered + l * bytes, mask >> l & 1 ? lanes[l].exchange.mine : &kPoisonWord, bytes);
    for_each_lane([&](Thread& t, size_t) {
      const unsigned from = t.exchange.from;
      if (from == kAllLanes) {
        copy_unseen(t.exchange.received, gathered, 32 * bytes);
      } else {
        copy_unseen(t.exchange.received, gathered + from * bytes, bytes);
      }
    });
  }
  r.waiting[warp] &= ~mask;
  for_each_lane([&](Thread&, size_t l) { wake(warp * 32 + l, opened); });
}

void meet_in_warp(unsigned mask, const Exchange& exchange, const std::source_location& location) {
  Thread& me = running();
  const size_t warp = r.current / 32, first = warp * 32, lanes = std::min<size_t>(32, r.count - first);
  me.place = Place(location);
  if (!(mask >> lane & 1))
    give_up(std::string(exchange.name) + " (" + me.place.words() + "): the mask lacks the lane that calls");
  if (lanes < 32) mask &= (1u << lanes) - 1;  // the last warp of a block may have fewer lanes
  me.mask = mask;
  me.exchange = exchange;
  me.state = State::at_warp_barrier;
  if (exchange.orders_memory) release(&me.arrived);
  r.waiting[warp] |= 1u << lane;
  bool complete = (r.waiting[warp] & mask) == mask;
  for (size_t l = 0; l < lanes && complete; ++l)
    if (mask >> l & 1) complete = r.threads[first + l].mask == mask;
  if (complete) open_warp(warp, mask);
  wait_for_turn();
}

}  // namespace

void warp_barrier(unsigned mask, const std::source_location& place) {
  meet_in_warp(mask, {.name = "__syncwarp", .orders_memory = true}, place);
}

void warp_exchange(unsigned mask, const char* name, const void* mine, size_t bytes, unsigned from,
                   void* received, const std::source_location& place) {
  meet_in_warp(mask, {name, mine, bytes, from % 32, received}, place);
}

void warp_gather(const void* mine, size_t bytes, void* all, const std::source_location& place) {
  if (bytes > kExchangeAtMost) give_up("warp_gather of more than 256 bytes a lane");
  if (r.count - r.current / 32 * 32 < 32) give_up("warp_gather in a warp of fewer than 32 lanes");
  meet_in_warp(~0u, {"warp_gather", mine, bytes, kAllLanes, all}, place);
}

unsigned warp_ballot(unsigned mask, bool predicate, const std::source_location& place) {
  unsigned char all[32], mine = predicate;
  meet_in_warp(mask, {"a vote", &mine, 1, kAllLanes, all}, place);
  unsigned bits = 0;
  for (unsigned l = 0; l < 32; ++l) bits |= static_cast<unsigned>(all[l] == 1) << l;  // others are poison
  return bits;
}

// ------------------------------------------------------------------------------------ asynchronous copies
namespace {

bool is_shared(const unsigned char* p, size_t bytes) {
  const auto holds = [&](const unsigned char* start, size_t size) {
    return p >= start && p + bytes <= start + size;
  };
  return holds(r.dynamic, r.dynamic_bytes) ||
         std::ranges::any_of(r.symbols.shared_variables,
                             [&](const SharedVariable& v) { return holds(v.start, v.bytes); });
}

bool is_aligned(const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

}  // namespace

void defer_copy(void* shared, const void* global, size_t bytes, bool valid) {
  if (bytes != 4 && bytes != 8 && bytes != 16) give_up("an asynchronous copy not of 4, 8 or 16 bytes");
  if (!is_aligned(shared, bytes) || !is_aligned(global, bytes))  // zeros too: hardware checks
    give_up("an asynchronous copy of misaligned bytes");
  if (!is_shared(static_cast<unsigned char*>(shared), bytes))
    give_up("an asynchronous copy to a place outside shared memory");
  std::memset(shared, kPoison, bytes);  // until the wait: neither the old bytes nor the new ones
  running().copies.push_back({shared, global, bytes, valid, running().groups});
}

void commit_copies() { ++running().groups; }

void wait_copies(int pending) {
  Thread& me = running();
  const auto arrives = [&](const Copy& c) { return c.group < me.groups - pending; };
  for (const Copy& c : me.copies) {
    if (!arrives(c)) continue;
    if (c.valid) {
      std::memcpy(c.to, c.from, c.bytes);
    } else {
      std::memset(c.to, 0, c.bytes);
    }
  }
  std::erase_if(me.copies, arrives);
}

// ------------------------------------------------------------------------------- products of a warpgroup
namespace {

constexpr int64_t kStartOfDynamic = 1024;  // the system reserves what is before it

}  // namespace

uint64_t shared_address(const void* shared) {
  const auto* p = static_cast<const unsigned char*>(shared);
  if (p < r.dynamic || p > r.dynamic + r.dynamic_bytes)
    give_up("the address of an operand outside dynamic shared memory");
  return static_cast<uint64_t>(p - r.dynamic + kStartOfDynamic);
}

const void* shared_at(int64_t address, size_t bytes) {
  const int64_t at = address - kStartOfDynamic;
  if (at < 0 || at + static_cast<int64_t>(bytes) > static_cast<int64_t>(r.dynamic_bytes))
    give_up("a product of a warpgroup reads outside dynamic shared memory");
  return r.dynamic + at;
}

void publish_shared() { running().published = true; }
void begin_products() { running().begun = true; }

void defer_product(const WarpgroupProduct& product) {
  Thread& me = running();
  if (r.count % 128 != 0) give_up("a product of a warpgroup in a block of incomplete warpgroups");
  if (!me.published) give_up("a product of a warpgroup whose operands in shared memory are not published");
  if (!me.begun) give_up("a product of a warpgroup without begin_products");
  me.products.push_back({product, me.product_groups});
}

void commit_products() { ++running().product_groups; }

void wait_products(int pending) {
  Thread& me = running();
  const auto ends = [&](const Product& p) { return p.group < me.product_groups - pending; };
  for (const Product& p : me.products)
    if (ends(p)) p.product.compute(p.product);
  std::erase_if(me.products, ends);
  if (me.products.empty()) me.published = me.begun = false;
}

}  // namespace emulation
