#if canImport(CryptoKit)
import CryptoKit
typealias FileHash = CryptoKit.SHA256
#else
typealias FileHash = PlainSHA256
#endif

/// SHA-256 where there is no CryptoKit; it has CryptoKit's two calls that are needed here.
///
/// Source: FIPS 180-4, https://doi.org/10.6028/NIST.FIPS.180-4.
struct PlainSHA256 {
    private static let constants: [UInt32] = [
        0x428a_2f98, 0x7137_4491, 0xb5c0_fbcf, 0xe9b5_dba5, 0x3956_c25b, 0x59f1_11f1, 0x923f_82a4,
        0xab1c_5ed5, 0xd807_aa98, 0x1283_5b01, 0x2431_85be, 0x550c_7dc3, 0x72be_5d74, 0x80de_b1fe,
        0x9bdc_06a7, 0xc19b_f174, 0xe49b_69c1, 0xefbe_4786, 0x0fc1_9dc6, 0x240c_a1cc, 0x2de9_2c6f,
        0x4a74_84aa, 0x5cb0_a9dc, 0x76f9_88da, 0x983e_5152, 0xa831_c66d, 0xb003_27c8, 0xbf59_7fc7,
        0xc6e0_0bf3, 0xd5a7_9147, 0x06ca_6351, 0x1429_2967, 0x27b7_0a85, 0x2e1b_2138, 0x4d2c_6dfc,
        0x5338_0d13, 0x650a_7354, 0x766a_0abb, 0x81c2_c92e, 0x9272_2c85, 0xa2bf_e8a1, 0xa81a_664b,
        0xc24b_8b70, 0xc76c_51a3, 0xd192_e819, 0xd699_0624, 0xf40e_3585, 0x106a_a070, 0x19a4_c116,
        0x1e37_6c08, 0x2748_774c, 0x34b0_bcb5, 0x391c_0cb3, 0x4ed8_aa4a, 0x5b9c_ca4f, 0x682e_6ff3,
        0x748f_82ee, 0x78a5_636f, 0x84c8_7814, 0x8cc7_0208, 0x90be_fffa, 0xa450_6ceb, 0xbef9_a3f7,
        0xc671_78f2,
    ]
    private var state: [UInt32] = [
        0x6a09_e667, 0xbb67_ae85, 0x3c6e_f372, 0xa54f_f53a, 0x510e_527f, 0x9b05_688c, 0x1f83_d9ab,
        0x5be0_cd19,
    ]
    private var rest: [UInt8] = []
    private var nBytes: UInt64 = 0

    mutating func update(bufferPointer bytes: UnsafeRawBufferPointer) {
        nBytes &+= UInt64(bytes.count)
        var start = 0
        if !rest.isEmpty {
            start = min(64 - rest.count, bytes.count)
            rest.append(contentsOf: bytes[..<start])
            guard rest.count == 64 else { return }
            let block = rest
            rest.removeAll(keepingCapacity: true)
            block.withUnsafeBytes { addBlocks($0, from: 0) }
        }
        addBlocks(bytes, from: start)
        rest.append(contentsOf: bytes[(start + (bytes.count - start) / 64 * 64)...])
    }

    mutating func finalize() -> [UInt8] {
        let nBits = nBytes &* 8
        var end: [UInt8] = [0x80]
        end += [UInt8](repeating: 0, count: (119 - rest.count) % 64)
        end += stride(from: 56, through: 0, by: -8).map { UInt8(truncatingIfNeeded: nBits >> UInt64($0)) }
        end.withUnsafeBytes { update(bufferPointer: $0) }
        return state.flatMap { word in
            stride(from: 24, through: 0, by: -8).map { UInt8(truncatingIfNeeded: word >> UInt32($0)) }
        }
    }

    /// Add all whole blocks of 64 bytes that follow a position.
    private mutating func addBlocks(_ bytes: UnsafeRawBufferPointer, from first: Int) {
        func turned(_ x: UInt32, _ n: UInt32) -> UInt32 { x >> n | x << (32 &- n) }
        var sums = state
        Self.constants.withUnsafeBufferPointer { constants in
            withUnsafeTemporaryAllocation(of: UInt32.self, capacity: 64) { words in
                for start in stride(from: first, through: bytes.count - 64, by: 64) {
                    for t in 0..<16 {
                        let word = bytes.loadUnaligned(fromByteOffset: start + 4 * t, as: UInt32.self)
                        words[t] = UInt32(bigEndian: word)
                    }
                    for t in 16..<64 {
                        let (x, y) = (words[t &- 15], words[t &- 2])
                        words[t] = words[t &- 16] &+ words[t &- 7]
                            &+ (turned(x, 7) ^ turned(x, 18) ^ x >> 3)
                            &+ (turned(y, 17) ^ turned(y, 19) ^ y >> 10)
                    }
                    var (a, b, c, d) = (sums[0], sums[1], sums[2], sums[3])
                    var (e, f, g, h) = (sums[4], sums[5], sums[6], sums[7])
                    for t in 0..<64 {
                        let one = h &+ (turned(e, 6) ^ turned(e, 11) ^ turned(e, 25))
                            &+ (e & f ^ ~e & g) &+ constants[t] &+ words[t]
                        let two = (turned(a, 2) ^ turned(a, 13) ^ turned(a, 22))
                            &+ (a & b ^ a & c ^ b & c)
                        (h, g, f, e, d, c, b, a) = (g, f, e, d &+ one, c, b, a, one &+ two)
                    }
                    for (i, x) in [a, b, c, d, e, f, g, h].enumerated() { sums[i] &+= x }
                }
            }
        }
        state = sums
    }
}
