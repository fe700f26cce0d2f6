import Foundation

/// Numbers of one factor, row by row and little-endian.
public struct Tensor: Sendable {
    /// What a number is stored as.
    public enum DType: String, Sendable {
        case float16, bfloat16, float32

        /// Bytes of a number.
        public var size: Int { self == .float32 ? 4 : 2 }
    }

    public let dtype: DType
    /// `(in, rank)` of `lora_a`, `(rank, out)` of `lora_b`.
    public let shape: [Int]
    public let data: Data

    /// The same with zeros at the end of every row, and rows of zeros at the end.
    func padded(to wanted: [Int]) -> Tensor {
        if wanted == shape { return self }
        let (row, wide) = (shape[1] * dtype.size, wanted[1] * dtype.size)
        var data = Data(count: wanted[0] * wide)
        for i in 0..<shape[0] {
            let start = self.data.startIndex + i * row
            data.replaceSubrange(i * wide..<i * wide + row, with: self.data[start..<start + row])
        }
        return Tensor(dtype: dtype, shape: wanted, data: data)
    }
}

/// One LoRA adapter, in the names of mlx-lm and mlx-swift: `y += scale * (x @ lora_a) @ lora_b`.
public struct Adapter: Sendable {
    /// Name of its directory where it is unpacked.
    public let name: String
    /// The base model's name, where it is known.
    public let base: String?
    public let scale: Double
    /// Transformer blocks of the base model.
    public let nLayers: Int
    /// Paths inside a block of the modules that it changes, such as `self_attn.q_proj`.
    public let keys: [String]
    /// `model.layers.0.self_attn.q_proj.lora_a` and so on, each module in its own rank.
    public let tensors: [String: Tensor]

    /// The largest rank of a module.
    public var rank: Int { tensors.lazy.map { $1.shape[$0.hasSuffix("a") ? 1 : 0] }.max() ?? 0 }

    /// A tensor with zeros up to the largest rank: stock mlx-lm takes one rank for all modules.
    public func padded(_ name: String) throws -> Tensor? {
        guard let found = tensors[name] else { return nil }
        let shape = name.hasSuffix("a") ? [found.shape[0], rank] : [rank, found.shape[1]]
        let (count, over) = shape[0].multipliedReportingOverflow(by: shape[1])
        guard !over, count <= 1 << 28 else { throw PackError("\(shown(name)): \(shape) is no LoRA") }
        return found.padded(to: shape)
    }
}

/// Where a tensor's module is: `<blocks>.<block>.<key>`.
struct ModulePath {
    let blocks: String
    let block: Int
    let key: String

    init(_ path: String) throws {
        // By bytes: a letter's accent may follow a dot and would hide it.
        let parts = split(path, at: ".")
        let at = parts.indices.dropFirst().first { i in
            parts[i - 1] == "layers" && i + 1 < parts.count && parts[i + 1] != ""
                && parts[i].utf8.allSatisfy { (0x30...0x39).contains($0) }
        }
        guard let at, let block = Int(parts[at]) else {
            throw PackError("\(shown(path)) is no linear module of a transformer block")
        }
        self.block = block
        blocks = parts[..<at].joined(separator: ".")
        key = parts[(at + 1)...].joined(separator: ".")
    }
}

/// Parts of a text between bytes, empty ones too. `String.split` looks at whole characters.
func split(_ text: String, at separator: Unicode.Scalar) -> [String] {
    text.unicodeScalars.split(separator: separator, omittingEmptySubsequences: false).map(String.init)
}
