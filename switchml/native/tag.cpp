#include "tag.hpp"

#include <openssl/crypto.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "packet.hpp"

namespace switchml {
namespace {

constexpr int kNonceBytes = kHeaderBytes + 8;

void check(bool worked, const char* what) {
  if (!worked) throw std::runtime_error(std::string("libcrypto: ") + what + " failed");
}

}  // namespace

Tagger::Tagger(const std::string& key) {
  if (key.empty()) return;
  check(key.size() == 32, "a key of 32 bytes");
  context_.reset(EVP_CIPHER_CTX_new());
  check(EVP_EncryptInit_ex(context_.get(), EVP_aes_256_gcm(), nullptr, nullptr, nullptr) == 1, "AES-256-GCM");
  check(EVP_CIPHER_CTX_ctrl(context_.get(), EVP_CTRL_AEAD_SET_IVLEN, kNonceBytes, nullptr) == 1, "nonce length");
  check(EVP_EncryptInit_ex(context_.get(), nullptr, nullptr, reinterpret_cast<const uint8_t*>(key.data()), nullptr) == 1, "key");
}

void Tagger::compute(const uint8_t* packet, size_t bytes, uint8_t* tag) {
  uint8_t nonce[kNonceBytes] = {};
  std::memcpy(nonce, packet, std::min<size_t>(bytes, kNonceBytes));
  int written = 0;
  EVP_CIPHER_CTX* context = context_.get();
  check(EVP_EncryptInit_ex(context, nullptr, nullptr, nullptr, nonce) == 1, "nonce");
  check(EVP_EncryptUpdate(context, nullptr, &written, packet, static_cast<int>(bytes)) == 1, "packet");
  check(EVP_EncryptFinal_ex(context, tag, &written) == 1, "end");
  check(EVP_CIPHER_CTX_ctrl(context, EVP_CTRL_AEAD_GET_TAG, kTagBytes, tag) == 1, "tag");
}

size_t Tagger::seal(uint8_t* packet, size_t bytes) {
  if (!on()) return bytes;
  compute(packet, bytes, packet + bytes);
  return bytes + kTagBytes;
}

bool Tagger::open(const uint8_t* packet, size_t& bytes) {
  if (!on()) return true;
  if (bytes < kHeaderBytes + kTagBytes) return false;
  uint8_t tag[kTagBytes];
  compute(packet, bytes - kTagBytes, tag);
  if (CRYPTO_memcmp(tag, packet + bytes - kTagBytes, kTagBytes) != 0) return false;
  bytes -= kTagBytes;
  return true;
}

}  // namespace switchml
