// The tag behind a packet, by OpenSSL's libcrypto.
#pragma once

#include <openssl/evp.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace switchml {

// AES-256-GMAC under one key. The nonce is the header and the first eight bytes behind it (or zeros): a retransmission is the
// same bytes, and no two messages of an epoch share it, since the one kind whose content may change under an equal
// header is the bitmap.
class Tagger {
 public:
  explicit Tagger(const std::string& key);
  bool on() const { return context_ != nullptr; }
  // Writes the tag of packet[0, bytes) behind it; the packet's length with its tag.
  size_t seal(uint8_t* packet, size_t bytes);
  // Whether the last 16 bytes are the tag of what is before them; then `bytes` is the length without it.
  bool open(const uint8_t* packet, size_t& bytes);

 private:
  void compute(const uint8_t* packet, size_t bytes, uint8_t* tag);
  struct Free {
    void operator()(EVP_CIPHER_CTX* context) const { EVP_CIPHER_CTX_free(context); }
  };
  std::unique_ptr<EVP_CIPHER_CTX, Free> context_;
};

}  // namespace switchml
