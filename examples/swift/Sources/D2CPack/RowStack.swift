/// Rows of one adapter in one kind, from the first to the last.
///
/// A number is `scale * code + bias`, in float32, where the product is exact, and then rounded to
/// float16: so every device has the same bits.
struct RowStack {
    let kind: CompactFile.Kind
    let groupSize: Int
    /// Bytes of weight, scales and biases; at 16 bits those of the numbers alone.
    let parts: [[UInt8]]
    private var row = 0

    init(kind: CompactFile.Kind, groupSize: Int, parts: [[UInt8]]) {
        (self.kind, self.groupSize, self.parts) = (kind, groupSize, parts)
    }

    /// The next row, `width` numbers.
    mutating func next() -> [Float16] {
        defer { row += 1 }
        let (bits, width) = (kind.bits, kind.width)
        if bits == 16 { return (0..<width).map { half(parts[0], row * width + $0) } }
        let nGroups = (width + groupSize - 1) / groupSize
        let first = row * nGroups * groupSize * bits / 8
        var numbers: [Float16] = []
        numbers.reserveCapacity(width)
        for group in 0..<nGroups {
            let scale = Float(half(parts[1], row * nGroups + group))
            let bias = Float(half(parts[2], row * nGroups + group))
            let start = group * groupSize
            for i in start..<min(start + groupSize, width) {
                numbers.append(Float16(scale * Float(code(first * 8 + i * bits)) + bias))
            }
        }
        return numbers
    }

    /// The code that begins at a bit; codes follow each other from the lowest bit up.
    private func code(_ bit: Int) -> UInt16 {
        let (byte, shift) = (bit / 8, bit % 8)
        var both = UInt16(parts[0][byte])
        if shift + kind.bits > 8 { both |= UInt16(parts[0][byte + 1]) << 8 }
        return both >> UInt16(shift) & (1 << UInt16(kind.bits) - 1)
    }

    private func half(_ bytes: [UInt8], _ i: Int) -> Float16 {
        Float16(bitPattern: UInt16(bytes[2 * i]) | UInt16(bytes[2 * i + 1]) << 8)
    }
}
