// The switch of _switch.py inside the kernel, profile `core`: packets of kind DATA are added where the driver hands
// them over (XDP), and answered from there. Joins and keep-alives go up to the process that loaded this.
//
// An answer to all workers is redirected to every entry of the session's device map; a program behind each entry turns
// its copy towards one worker, or drops it where that worker need not be told.
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/udp.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define MAGIC 0xB1
#define FROM_SWITCH 0xFF
#define MOST 352
#define SESSIONS 4
#define SLOTS 64
#define WORKERS 32

enum kind { DATA = 1, RESULT = 2, PROGRESS = 3, CONTROL = 16 };
enum counter { RECEIVED, RECEIVED_BYTES, CHUNKS, REPEATS, SENT_PROGRESS, STALE, FOREIGN, MALFORMED, COUNTERS };
enum verdict { NOTHING, TO_ALL, TO_ONE, TO_MISSING };

struct header {
  __u8 magic, kind;
  __be16 session;
  __be32 epoch, chunk;
  __be16 slot;
  __u8 worker, exponent;
  __be16 elements;
  __u8 wire, lane;
} __attribute__((packed));

struct heads {
  struct ethhdr eth;
  struct iphdr ip;
  struct udphdr udp;
  struct header sml;
} __attribute__((packed));

struct worker {
  __be32 address;
  __be16 port;
  __u8 mac[ETH_ALEN];
};

struct session {
  __u32 active, epoch, world, slots, elements;
  struct worker workers[WORKERS];
};

struct version {
  struct bpf_spin_lock lock;
  __u32 epoch, chunk, seen, exponent, elements;
  __s32 sums[MOST];
};

struct place {
  __be32 address;
  __u32 port;
};

struct neighbour {
  __u32 interface;
  __u8 mac[ETH_ALEN];
};

struct {
  __uint(type, BPF_MAP_TYPE_ARRAY);
  __uint(max_entries, 1);
  __type(key, __u32);
  __type(value, struct place);
} listen SEC(".maps");

struct {
  __uint(type, BPF_MAP_TYPE_ARRAY);
  __uint(max_entries, SESSIONS);
  __type(key, __u32);
  __type(value, struct session);
} sessions SEC(".maps");

struct {
  __uint(type, BPF_MAP_TYPE_ARRAY);
  __uint(max_entries, SESSIONS * SLOTS * 2);
  __type(key, __u32);
  __type(value, struct version);
} versions SEC(".maps");

struct {
  __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
  __uint(max_entries, COUNTERS);
  __type(key, __u32);
  __type(value, __u64);
} counters SEC(".maps");

struct {
  __uint(type, BPF_MAP_TYPE_LRU_HASH);
  __uint(max_entries, 1024);
  __type(key, __be32);
  __type(value, struct neighbour);
} neighbours SEC(".maps");

#define PORTS(session)                                \
  struct {                                            \
    __uint(type, BPF_MAP_TYPE_DEVMAP);                \
    __uint(max_entries, WORKERS);                     \
    __type(key, __u32);                               \
    __type(value, struct bpf_devmap_val);             \
  } ports##session SEC(".maps");
PORTS(0) PORTS(1) PORTS(2) PORTS(3)

static __always_inline void count(__u32 which, __u64 by) {
  __u64* value = bpf_map_lookup_elem(&counters, &which);
  if (value) *value += by;
}

static __always_inline int refused(__u32 which) {
  count(which, 1);
  return XDP_DROP;
}

// Towards one worker, from where its packet had been sent to.
static __always_inline void address(struct heads* h, const struct worker* to) {
  __builtin_memcpy(h->eth.h_dest, to->mac, ETH_ALEN);
  h->ip.daddr = to->address;
  h->udp.dest = to->port;
  h->ip.check = 0;
  __u32 sum = 0;
  __u16* words = (void*)h + sizeof h->eth;
  for (int i = 0; i < 10; i++) sum += words[i];
  sum = (sum & 0xFFFF) + (sum >> 16);
  h->ip.check = ~((sum & 0xFFFF) + (sum >> 16));
}

// 0, or as many as a session may have: loops of fixed length are what the kernel can check.
#define SIZES(DO) DO(64) DO(256) DO(352)

static __always_inline int add(struct version* v, __be32* from, void* end, __u32 elements, int fresh) {
#define ADD(K)                                                                                     \
  if (elements == K) {                                                                             \
    if ((void*)(from + K) > end) return 0;                                                         \
    if (fresh)                                                                                     \
      for (int i = 0; i < K; i++) v->sums[i] = (__s32)bpf_ntohl(from[i]);                          \
    else                                                                                           \
      for (int i = 0; i < K; i++) v->sums[i] = (__s32)((__u32)v->sums[i] + bpf_ntohl(from[i]));    \
  }
  SIZES(ADD)
  return 1;
}

static __always_inline void store(const struct version* v, __be32* to, void* end, __u32 elements) {
#define STORE(K)                                                             \
  if (elements == K && (void*)(to + K) <= end)                               \
    for (int i = 0; i < K; i++) to[i] = bpf_htonl((__u32)v->sums[i]);
  SIZES(STORE)
}

static __always_inline int redirected(__u32 session, __u32 worker, __u64 flags) {
  switch (session) {
    case 0: return bpf_redirect_map(&ports0, worker, flags);
    case 1: return bpf_redirect_map(&ports1, worker, flags);
    case 2: return bpf_redirect_map(&ports2, worker, flags);
    default: return bpf_redirect_map(&ports3, worker, flags);
  }
}

SEC("xdp")
int aggregate(struct xdp_md* context) {
  void* end = (void*)(long)context->data_end;
  struct heads* h = (void*)(long)context->data;
  __u32 zero = 0;
  struct place* here = bpf_map_lookup_elem(&listen, &zero);
  if (!here || (void*)h + sizeof h->eth + sizeof h->ip + sizeof h->udp > end) return XDP_PASS;
  if (h->eth.h_proto != bpf_htons(ETH_P_IP) || h->ip.ihl != 5 || h->ip.protocol != IPPROTO_UDP) return XDP_PASS;
  if (h->ip.daddr != here->address || h->udp.dest != (__be16)here->port) return XDP_PASS;
  if (h->ip.frag_off & bpf_htons(0x3FFF)) return XDP_PASS;
  count(RECEIVED, 1);
  count(RECEIVED_BYTES, bpf_ntohs(h->udp.len) - sizeof h->udp);
  if ((void*)(h + 1) > end || h->sml.magic != MAGIC) return refused(MALFORMED);
  if (h->sml.kind == CONTROL) {
    struct neighbour seen = {.interface = context->ingress_ifindex};
    __builtin_memcpy(seen.mac, h->eth.h_source, ETH_ALEN);
    __be32 source = h->ip.saddr;
    bpf_map_update_elem(&neighbours, &source, &seen, BPF_ANY);
    return XDP_PASS;
  }

  __u32 number = bpf_ntohs(h->sml.session), worker = h->sml.worker, elements = bpf_ntohs(h->sml.elements);
  __u32 chunk = bpf_ntohl(h->sml.chunk);
  struct session* session = bpf_map_lookup_elem(&sessions, &number);
  if (!session || !session->active || session->epoch != bpf_ntohl(h->sml.epoch)) return refused(FOREIGN);
  if (bpf_ntohs(h->udp.len) != sizeof h->udp + sizeof h->sml + 4 * elements) return refused(MALFORMED);
  if (worker >= session->world || worker >= WORKERS) return refused(FOREIGN);
  struct worker* from = &session->workers[worker];
  if (h->ip.saddr != from->address || h->udp.source != from->port) return refused(FOREIGN);
  __u32 slots = session->slots;
  if (slots == 0 || h->sml.kind != DATA || h->sml.wire != 4) return refused(MALFORMED);
  if (elements != 0 && elements != session->elements) return refused(MALFORMED);
  __u32 slot = chunk % slots, second = chunk / slots & 1;
  if (bpf_ntohs(h->sml.slot) != (slot | second << 15)) return refused(MALFORMED);
  __u32 index = (number * SLOTS + slot) * 2 + second;
  struct version* v = bpf_map_lookup_elem(&versions, &index);
  if (!v) return refused(MALFORMED);

  __be32* payload = (__be32*)(h + 1);
  __u32 bit = 1u << worker, all = session->world == 32 ? 0xFFFFFFFF : (1u << session->world) - 1;
  __u32 verdict = NOTHING, counted = COUNTERS, epoch = session->epoch, seen = 0, exponent = h->sml.exponent;
  bpf_spin_lock(&v->lock);
  int known = v->epoch == epoch && v->seen != 0, fresh = !known || chunk > v->chunk;
  if (known && chunk < v->chunk) {
    counted = STALE;
  } else if (!fresh && elements != v->elements) {
    counted = MALFORMED;
  } else if (!fresh && v->seen & bit) {
    counted = REPEATS;
    verdict = v->seen == all ? TO_ONE : TO_MISSING;
  } else if (!add(v, payload, end, elements, fresh)) {
    counted = MALFORMED;
  } else {
    if (fresh) v->epoch = epoch, v->chunk = chunk, v->seen = 0, v->exponent = 0, v->elements = elements;
    v->seen |= bit;
    if (exponent > v->exponent) v->exponent = exponent;
    if (v->seen == all) verdict = TO_ALL, counted = CHUNKS;
  }
  if (verdict == TO_ALL || verdict == TO_ONE) store(v, payload, end, elements);
  seen = v->seen, exponent = v->exponent;
  bpf_spin_unlock(&v->lock);
  if (counted < COUNTERS) count(counted, 1);
  if (verdict == NOTHING) return XDP_DROP;

  __builtin_memcpy(h->eth.h_source, h->eth.h_dest, ETH_ALEN);
  h->ip.saddr = h->ip.daddr, h->ip.ttl = 64;
  h->udp.source = h->udp.dest, h->udp.check = 0;
  h->sml.worker = FROM_SWITCH;
  if (verdict == TO_MISSING) {
    h->sml.kind = PROGRESS, h->sml.exponent = 0, h->sml.elements = 0;
    h->udp.len = bpf_htons(sizeof h->udp + sizeof h->sml + 8);
    h->ip.tot_len = bpf_htons(sizeof h->ip + sizeof h->udp + sizeof h->sml + 8);
    if (bpf_xdp_adjust_tail(context, 8 - 4 * (int)elements)) return XDP_DROP;
    h = (void*)(long)context->data, end = (void*)(long)context->data_end;
    payload = (__be32*)(h + 1);
    if ((void*)(payload + 2) > end) return XDP_DROP;
    payload[0] = 0, payload[1] = bpf_htonl(seen);
    return redirected(number, 0, BPF_F_BROADCAST);
  }
  h->sml.kind = RESULT, h->sml.exponent = exponent;
  // not XDP_TX: a veth leaves such frames lying until others come
  return verdict == TO_ALL ? redirected(number, 0, BPF_F_BROADCAST) : redirected(number, worker, 0);
}

static __always_inline int towards(struct xdp_md* context, __u32 worker) {
  void* end = (void*)(long)context->data_end;
  struct heads* h = (void*)(long)context->data;
  __be32* payload = (__be32*)(h + 1);
  if ((void*)payload > end) return XDP_DROP;
  __u32 number = bpf_ntohs(h->sml.session);
  struct session* session = bpf_map_lookup_elem(&sessions, &number);
  if (!session) return XDP_DROP;
  if (h->sml.kind == PROGRESS) {
    if ((void*)(payload + 2) > end || bpf_ntohl(payload[1]) >> worker & 1) return XDP_DROP;
    count(SENT_PROGRESS, 1);
  }
  address(h, &session->workers[worker]);
  return XDP_PASS;
}

#define TOWARDS(W)                                                                   \
  SEC("xdp/devmap")                                                                  \
  int towards_##W(struct xdp_md* context) { return towards(context, W); }
TOWARDS(0) TOWARDS(1) TOWARDS(2) TOWARDS(3) TOWARDS(4) TOWARDS(5) TOWARDS(6) TOWARDS(7)
TOWARDS(8) TOWARDS(9) TOWARDS(10) TOWARDS(11) TOWARDS(12) TOWARDS(13) TOWARDS(14) TOWARDS(15)
TOWARDS(16) TOWARDS(17) TOWARDS(18) TOWARDS(19) TOWARDS(20) TOWARDS(21) TOWARDS(22) TOWARDS(23)
TOWARDS(24) TOWARDS(25) TOWARDS(26) TOWARDS(27) TOWARDS(28) TOWARDS(29) TOWARDS(30) TOWARDS(31)

char licence[] SEC("license") = "Apache-2.0";
